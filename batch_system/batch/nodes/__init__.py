"""The life and death of processes: heartbeats, leases and rescues. Knows no attempt."""
