"""Why a run, a task or an incident is as it is, and what differs from when it last worked."""
