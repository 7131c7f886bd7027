"""The examples at the end of each command's help, by its name: what is typed, and what it is for."""

from __future__ import annotations

EXAMPLES: dict[str, dict[str, str]] = {
    "serve": {
        "batch serve": "on HOST and PORT",
        "batch serve --host 0.0.0.0 --port 8080": "for other machines too",
        "batch serve --reload": "while you write tasks",
    },
    "new": {
        "batch new daily_sales": "every day at 02:00",
        'batch new daily_sales --schedule "15 6 * * 1-5"': "on weekdays at 06:15",
        "batch new import_files --sync --schedule none": "by hand, in a thread",
    },
    "tasks": {
        "batch tasks": "what there is, and what fires next",
        "batch tasks --json": "for a program",
    },
    "next": {
        'batch next "0 2 * * *"': "the next five times",
        'batch next "30 2 * * *" --tz Europe/Berlin -n 10': "in a zone whose clock changes",
        "batch next @weekly --after 2027-01-01": "after that instant",
    },
    "lint": {
        "batch lint": "every task",
        "batch lint backup -n 10": "one task, with its next ten times",
        "batch lint -n 0 --json": "findings only, for a program",
    },
    "pause": {"batch pause backup": "no more backups, until it is resumed"},
    "resume": {"batch resume backup": "from now on"},
    "run": {
        "batch run backup": "now",
        "batch run daily_report --param day=2026-11-24": "with a parameter of its run()",
        "batch run daily_report --slot 2026-11-25T01:00": "as if it had fired at that slot",
        "batch run backup --queue --wait": "in the running service, with its log",
    },
    "runs": {
        "batch runs --limit 10": "the newest ten",
        "batch runs --task backup --state failed": "what failed of one task",
        "batch runs --since 2h --json": "for a program",
    },
    "show": {
        "batch show 01a212f3": "a run whose id begins so",
        "batch show backup": "a task",
        "batch show backup --json": "for a program",
    },
    "logs": {
        "batch logs 01a212f3": "of a run whose id begins so",
        "batch logs backup --follow": "of the newest run of a task, until it ends",
        "batch logs backup --json | jq .text": "for a program",
    },
    "watch": {
        "batch watch 01a212f3": "a run whose id begins so",
        "batch watch backup": "the newest run of a task",
        "batch watch backup | tee watched.txt": "as lines, every 10 seconds at most",
    },
    "cancel": {
        "batch cancel 01a212f3": "the run whose id begins so",
        "batch cancel 01a212f3 --wait 0": "without waiting for its end",
    },
    "quarantine": {
        "batch quarantine 01a212f3": "what a run set aside, and why",
        "batch quarantine 01a212f3 --json": "with tracebacks, for a program",
    },
    "redrive": {
        "batch redrive 01a212f3": "all that it set aside, in a new run",
        "batch redrive 01a212f3 --item 7 --item 8": "only these",
    },
    "retry": {
        "batch retry 01a212f3": "after its last checkpoint",
        "batch retry 01a212f3 --again": "from the beginning, also if it succeeded",
    },
    "backfill": {
        "batch backfill daily_report --from 2026-11-01 --to 2026-11-07 --dry-run": "what it would do",
        "batch backfill daily_report --from 2026-11-01 --to 2026-11-07": "the slots that have no run",
        "batch backfill daily_report --from 2026-11-01 --to 2026-11-07 --again": "all of them, anew",
    },
    "account": {
        "batch account": "the last 24 hours",
        "batch account --since 7d --task backup": "a week of one task",
        "batch account --since 2h --slots": "each slot, with what became of it",
    },
    "prune": {
        "batch prune --dry-run": "how much would go",
        "batch prune": "now, and not at the service's next hour",
    },
    "backup list": {
        "batch backup list": "what there is, how it was checked, and why it is kept",
        "batch backup list --rescan": "when files were moved, or the ledger is new",
        "batch backup list --json": "for a program",
    },
    "backup show": {
        "batch backup show latest": "its tables, and what was done with it",
        "batch backup show backup_20261125_020000.backup.gz --json": "for a program",
    },
    "backup diff": {
        "batch backup diff latest": "to the database as it is now",
        "batch backup diff backup_20261124_020000.backup.gz latest": "from one backup to a later one",
        "batch backup diff latest --json": "for a program",
    },
    "backup create": {"batch backup create": "now, beside the running service"},
    "backup verify": {
        "batch backup verify": "the latest: every byte is as it was written",
        "batch backup verify --restore": "and its rows load",
        "batch backup verify s3://bucket/shop/backup_20261125_020000.backup.gz": "where it is",
    },
    "backup restore": {
        "batch backup restore latest --dry-run": "what it would do, tried and rolled back",
        "batch backup restore latest": "asks for the database's name first",
        "batch backup restore s3://bucket/shop/latest --yes": "on an empty machine",
    },
    "backup upload": {"batch backup upload": "the latest to BACKUP_URL"},
    "backup download": {
        "batch backup download": "the latest from BACKUP_URL",
        "batch backup download s3://bucket/shop/backup_20261125_020000.backup.gz": "from anywhere",
    },
    "backup prune": {
        "batch backup prune --dry-run": "what would go, and why the rest stays",
        "batch backup prune": "now, and not after the next backup",
        "batch backup prune --yes": "also more than half of them, where a setting was made smaller",
    },
    "backup pin": {"batch backup pin latest": "before a risky change"},
    "backup unpin": {"batch backup unpin backup_20261125_020000.backup.gz": "when it is not needed any more"},
}
