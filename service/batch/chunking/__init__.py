"""Long work in chunks: each commits its data and its place together, and a later attempt goes on behind the last."""
