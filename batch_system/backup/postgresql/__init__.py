"""Connections, snapshots and tables of PostgreSQL. Knows neither backup task nor restore."""
