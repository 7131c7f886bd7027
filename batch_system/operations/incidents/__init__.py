"""What people ask of incidents: lists, details, acknowledging, muting."""
