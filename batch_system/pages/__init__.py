"""The pages for people: they ask operations, and render HTML on the server. They know no SQL."""
