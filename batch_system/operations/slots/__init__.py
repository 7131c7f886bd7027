"""The account of slots, and missed slots that are left as they are."""
