"""The account of slots, and backfills of them."""
