"""The examples at the end of the help of each command: command lines, each with a sentence that
says what it does.
"""

from __future__ import annotations

EXAMPLES: dict[str, dict[str, str]] = {
    "serve": {
        "batch serve": "Listen on the address and port in the settings HOST and PORT.",
        "batch serve --host 0.0.0.0 --port 8080": "Accept requests from other machines too.",
        "batch serve --reload": "Restart whenever you save a file.",
    },
    "demo": {
        "batch demo": "Show the pages on port 8000; nothing of it is kept.",
        "batch demo --folder .demo --port 8080": "Keep its files in a folder.",
    },
    "work": {
        "batch work --pool cpu": "Execute the runs of the pool cpu on this machine.",
        "batch work --pool cpu --pool gpu --max-running "
        "8": "Execute the runs of two pools, at most eight at once.",
        "batch work --pool cpu --port 8001": "Answer health checks and a monitor on this port.",
    },
    "night": {
        "batch night": "Say what happened since 18:00 yesterday, and what needs a person.",
        "batch night --since 7d --zone Europe/Berlin": "Say it of the last seven days.",
        "batch night --json": "Print the same as JSON for a program.",
    },
    "forecast": {
        "batch forecast": "Say which promised deadlines are in danger, and what decides it.",
        "batch forecast --zone Europe/Berlin": "Say it with the times of Berlin.",
    },
    "status": {
        "batch status": "Say whether something is wrong, and what.",
        "batch status --json": "Print the same as JSON for a monitor.",
    },
    "doctor": {
        "batch doctor": "Look at each part, and say what is wrong and what to do.",
        "batch doctor --json": "Print the same as JSON for a program.",
    },
    "pools": {
        "batch pools": "List the pools, and how many of their runs are running and waiting.",
        "batch pools --json": "Print the list as JSON for a program.",
    },
    "nodes": {
        "batch nodes": "List the processes of the service.",
        "batch nodes --json": "Print the list as JSON for a program.",
    },
    "config": {
        "batch config": "Show all settings.",
        "batch config --json": "Print the settings as JSON for a program.",
    },
    "migrate": {
        "batch migrate --check": "Show the revisions, and exit with code 1 if a migration is due.",
        "batch migrate": "Migrate both databases, for example before the service is updated.",
        "batch migrate --to ledger_0010": "Migrate the tables of this revision, and no further.",
    },
    "incidents": {
        "batch incidents": "Show what needs a person.",
        "batch incidents --state all --task "
        "load": "Show all incidents of a task, also those that are over.",
        "batch incidents --json": "Print the list as JSON for a program.",
    },
    "ack": {
        'batch ack 9f2c41d0 --note "the bank is down, we '
        'wait"': "Say that somebody takes care of an incident.",
        'batch ack 9f2c41d0 --note "fixed in 2.15" --quiet '
        "2d": "Let the same error open no incident for two days.",
    },
    "mute": {
        'batch mute load --for 2h --note "database '
        'upgrade"': "Send nothing about a task for two hours.",
        "batch mute --all --from 2026-12-05T22:00 --for 2h": "Send nothing at all on that evening.",
    },
    "unmute": {
        "batch unmute load": "Send messages about the task again.",
        "batch unmute --all": "End the mute of all tasks.",
    },
    "alerts list": {
        "batch alerts list": "List the newest messages about incidents.",
        "batch alerts list --state given_up": "List those that no channel has taken.",
        "batch alerts list --json": "Print the list as JSON for a program.",
    },
    "alerts test": {
        "batch alerts test": "Send a test message to all channels.",
        "batch alerts test --to payments": "Send it to the channels with this name only.",
    },
    "new": {
        "batch new daily_sales": "Write a task that fires every day at 02:00.",
        'batch new daily_sales --schedule "15 6 * * '
        '1-5"': "Write a task that fires on weekdays at 06:15.",
        "batch new import_files --sync --schedule "
        "none": "Write a task that is started by hand and runs in a thread.",
    },
    "tasks": {
        "batch tasks": "List the tasks.",
        "batch tasks --json": "Print the list as JSON for a program.",
    },
    "keys": {
        "batch keys mail": "Show which keys of the task mail have running or waiting runs.",
    },
    "next": {
        'batch next "0 2 * * *"': "Show the next five times.",
        'batch next "30 2 * * *" --tz Europe/Berlin -n '
        "10": "Show the next ten times in this time zone.",
        "batch next @weekly --after 2027-01-01": "Show times after the beginning of 2027.",
        "batch next backup": "Show the next times of a task.",
        'batch next "H 2 * * *" --task load': "Show what H is for the task load.",
    },
    "lint": {
        "batch lint": "Check every task.",
        "batch lint backup -n 10": "Check one task, and show its next ten slots.",
        "batch lint -n 0 --json": "Print the findings without slots, as JSON for a program.",
    },
    "pause": {
        "batch pause backup": "Make no more backups until the task is resumed.",
        'batch pause load --for 2h --note "database '
        'upgrade"': "Fire a task again by itself after two hours.",
        "batch pause --tag warehouse": "Stop firing all tasks that have this tag.",
        "batch pause --all --from 2026-12-05T22:00 --for 2h": "Plan a maintenance window.",
    },
    "resume": {
        "batch resume backup": "Make backups again from now on.",
        "batch resume --tag warehouse": "End the pause of the tasks that have this tag.",
    },
    "maintenance list": {
        "batch maintenance list": "List what is paused, muted or planned by a selection.",
        "batch maintenance list --json": "Print the list as JSON for a program.",
    },
    "calendars list": {
        "batch calendars list": "List the calendars, and the tasks that use them.",
        "batch calendars list --json": "Print the list as JSON for a program.",
    },
    "calendars show": {
        "batch calendars show bank": "Show the dates of the calendar bank.",
    },
    "maintenance end": {
        "batch maintenance end 9f2c41d0": "End a window, or call off a planned one.",
    },
    "run": {
        "batch run backup": "Run the task now, in this process.",
        "batch run daily_report --param day=2026-11-24": "Run the task with a parameter.",
        "batch run daily_report --slot 2026-11-25T01:00": "Run the task for a slot of the past.",
        "batch run backup --queue "
        "--wait": "Run the task in the running service, and show its log here.",
        "batch run backup --queue --at 2026-11-25T22:00": "Let the run begin later.",
        "batch run backup --queue --once-in 3600": "Queue it, unless it was within the last hour.",
        "batch run backup --json": "Print the run as JSON for a program, and the log on stderr.",
    },
    "runs": {
        "batch runs --limit 10": "List the newest ten runs.",
        "batch runs --task backup --state failed": "List the failed runs of one task.",
        "batch runs --state failed --ended-since 1h "
        "--exit-code": "Exit with code 1 if a run failed in the last hour.",
        "batch runs --task daily_report --since 7d --param "
        "day=2026-11-24": "List the runs with this parameter.",
        "batch runs --since 2h "
        "--json": "Print the runs of the last two hours as JSON for a program.",
    },
    "show": {
        "batch show 8b837dd8": "Show the run whose id ends in these digits, or begins with them.",
        "batch show backup": "Show a task.",
        "batch show backup --json": "Print everything about a task as JSON for a program.",
    },
    "why": {
        "batch why c3044eac": "Say why a run failed, and what differs from the last good one.",
        "batch why load": "Say why a task fails or does not run.",
        "batch why 9f2c41d0 --json": "Print the answer about an incident as JSON for a program.",
    },
    "logs": {
        "batch logs 8b837dd8": "Show the log of the run whose id ends in these digits.",
        "batch logs backup "
        "--follow": "Show the log of the newest run of a task, until the run ends.",
        "batch logs backup --json | jq .text": "Give the log lines as JSON to another program.",
    },
    "watch": {
        "batch watch 8b837dd8": "Follow the run whose id ends in these digits.",
        "batch watch backup": "Follow the newest run of a task.",
        "batch watch backup | tee "
        "watched.txt": "Print lines instead of a bar, and save them in a file.",
    },
    "cancel": {
        "batch cancel 8b837dd8": "Cancel the run whose id ends in these digits.",
        "batch cancel 8b837dd8 --wait 0": "Cancel the run, and do not wait for its end.",
        "batch cancel --task import --state "
        "queued": "Cancel all queued runs of a task, after you have said yes.",
    },
    "quarantine": {
        "batch quarantine": "List all items that wait in quarantine.",
        "batch quarantine 8b837dd8": "List the items that the run has set aside.",
        "batch quarantine 8b837dd8 "
        "--json": "Print the items with tracebacks, as JSON for a program.",
    },
    "redrive": {
        "batch redrive 8b837dd8": "Process all items that the run has set aside.",
        "batch redrive 8b837dd8 --item 7 --item 8": "Process only these two items.",
    },
    "retry": {
        "batch retry 8b837dd8": "Continue the run after its last checkpoint.",
        "batch retry 8b837dd8 --again": "Begin the run from the beginning, even if it succeeded.",
        "batch retry --state failed --ended-since "
        "2h": "Retry what failed in two hours, after you have said yes.",
        "batch retry --task import --since 1d "
        "--yes": "Retry all runs of a task of one day, and do not ask.",
    },
    "undo": {
        "batch undo 01a21da9-8d21-787f-954f-5088ae9c331f": "Cancel what a bulk has retried, after "
        "you have said yes.",
    },
    "backfill": {
        "batch backfill daily_report --from 2026-11-01 --to 2026-11-07 "
        "--dry-run": "Show what the command would do.",
        "batch backfill daily_report --from 2026-11-01 --to "
        "2026-11-07": "Create runs for the slots that have none.",
        "batch backfill daily_report --from 2026-11-01 --to 2026-11-07 "
        "--again": "Also repeat runs that are over.",
    },
    "account": {
        "batch account": "Check all slots of the last 24 hours.",
        "batch account --since 7d --task "
        "backup": "Check the slots of one task in the last seven days.",
        "batch account --since 2h --slots": "List each slot of the last two hours, with its run.",
    },
    "prune": {
        "batch prune --dry-run": "Show how many runs would be deleted.",
        "batch prune": "Delete old runs now.",
    },
    "backup list": {
        "batch backup list": "List the backups, with their last check and the reason to keep them.",
        "batch backup list --rescan": "Read every file, for example after files were moved.",
        "batch backup list --json": "Print the list as JSON for a program.",
    },
    "backup show": {
        "batch backup show latest": "Show the tables and the history of the latest backup.",
        "batch backup show backup_20261125_020000.backup.gz "
        "--json": "Print a backup's details as JSON for a program.",
    },
    "backup diff": {
        "batch backup diff latest": "Compare the latest backup with the database as it is now.",
        "batch backup diff backup_20261124_020000.backup.gz "
        "latest": "Compare an older backup with the latest one.",
        "batch backup diff latest --json": "Print the differences as JSON for a program.",
    },
    "backup create": {"batch backup create": "Make a backup now. The service may be running."},
    "backup verify": {
        "batch backup verify": "Check that every byte of the latest backup is as it was written.",
        "batch backup verify --restore": "Also check that its rows can be loaded into a database.",
        "batch backup verify "
        "s3://bucket/shop/backup_20261125_020000.backup.gz": "Check a backup in a bucket.",
    },
    "backup restore": {
        "batch backup restore latest --dry-run": "Try the restore, and roll it back.",
        "batch backup restore latest": "Restore, after you have typed the database's name.",
        "batch backup restore s3://bucket/shop/latest "
        "--yes": "Restore from a bucket, and do not ask.",
        "batch backup restore latest --into sqlite:///./copy.db": "Restore into another database.",
    },
    "backup upload": {"batch backup upload": "Copy the latest backup to BACKUP_URL."},
    "backup download": {
        "batch backup download": "Copy the latest backup from BACKUP_URL.",
        "batch backup download "
        "s3://bucket/shop/backup_20261125_020000.backup.gz": "Copy a backup from another bucket.",
    },
    "backup prune": {
        "batch backup prune "
        "--dry-run": "Show which backups would be deleted, and why others are kept.",
        "batch backup prune": "Delete old backups now.",
        "batch backup prune "
        "--yes": "Delete old backups, even if they are more than half of all backups.",
    },
    "backup pin": {
        "batch backup pin latest": "Keep the latest backup, for example before a risky change."
    },
    "backup unpin": {
        "batch backup unpin "
        "backup_20261125_020000.backup.gz": "Allow this backup to be deleted when it is old."
    },
    "backup delete": {
        "batch backup delete "
        "backup_20261125_020000.backup.gz": "Delete this backup, after you have said yes.",
        "batch backup delete backup_20261125_020000.backup.gz "
        "--yes": "Delete this backup, and do not ask.",
    },
    "token create": {
        "batch token create grafana --role viewer": "Make a token that only reads.",
        "batch token create deploy --role operator > "
        "deploy.token": "Save it; after `umask 077` only you can read it.",
    },
    "token list": {
        "batch token list": "List the tokens.",
        "batch token list --json": "Print the list as JSON for a program.",
    },
    "token sessions": {
        "batch token sessions": "List who is signed in, since when and from where.",
        "batch token sessions --json": "Print the list as JSON for a program.",
    },
    "token end-session": {
        "batch token end-session 3fa91c22": "Sign a person out.",
    },
    "token revoke": {"batch token revoke deploy": "Let the token be refused from now on."},
    "changes": {
        "batch changes": "Show the newest changes.",
        "batch changes --since 1d --task "
        "import": "Show who has changed something about a task in one day.",
        "batch changes --action run.cancel "
        "--json": "Print who has cancelled runs, as JSON for a program.",
        "batch changes --since 1d --counts": "Count the changes of a day by person and kind.",
    },
}
