"""The HTTP endpoints. They parse, call and answer, and know no SQL."""
