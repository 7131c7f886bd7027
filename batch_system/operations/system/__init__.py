"""What people ask of the system as a whole: its nodes, pools, gauges, settings and migrations."""
