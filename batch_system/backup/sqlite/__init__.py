"""Files, tables and structure of SQLite. The SQL in a file from elsewhere is never executed."""
