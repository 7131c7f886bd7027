-- Run once by the image of PostgreSQL, when its volume is new: an ordinary role, which owns its database and nothing else.
\getenv password POSTGRES_PASSWORD
CREATE ROLE batch LOGIN PASSWORD :'password';
CREATE DATABASE batch OWNER batch;
-- It may change all of its tables. docs/security.md has a second role, which may add to the audit and not change it.
-- The service knows the password. The superuser then has none, and connects inside the container only.
ALTER ROLE postgres PASSWORD NULL;
