"""How slots become runs, when schedules fire or change. The only room that knows APScheduler."""
