"""The resources of the HTTP API, version 1."""
