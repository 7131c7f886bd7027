"""The addresses of the pages."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from batch_system.concurrency.offload import offload
from batch_system.pages import backups, sign_in, system
from batch_system.pages.changes import changes
from batch_system.pages.frame.answers import PageRoute, action, asked, download, page
from batch_system.pages.frame.assets import assets
from batch_system.pages.frame.preferences import set_preferences
from batch_system.pages.incidents import actions, listing, room
from batch_system.pages.live import live
from batch_system.pages.night import left_slots, outage_backfills, unaccounted
from batch_system.pages.night.night import BLOCKS, show_night
from batch_system.pages.runs import bulks, run_actions, run_parts, runs
from batch_system.pages.runs.saved_views import save_view
from batch_system.pages.search import search
from batch_system.pages.tasks import (
    backfills,
    calendars,
    keys,
    maintenance,
    start_form,
    task,
    tasks,
)
from batch_system.web.problems import Refused

FOR_EVER = "public, max-age=31536000, immutable"


async def _static(request: Request) -> Response:
    """A file of the pages. Its name changes with its content, so it may be kept for ever."""
    asset = (await offload(assets)).by_name.get(request.path_params["name"])
    if asset is None:
        raise Refused(404, "there is no such file")
    headers = {"Cache-Control": FOR_EVER, "Vary": "Accept-Encoding"}
    if asset.packed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        return Response(
            asset.packed,
            media_type=asset.media_type,
            headers={**headers, "Content-Encoding": "gzip"},
        )
    return Response(asset.content, media_type=asset.media_type, headers=headers)


routes = [
    page("/", show_night, blocks=BLOCKS),
    page("/unaccounted", unaccounted.show_unaccounted),
    page("/tasks", tasks.show_tasks, blocks=("numbers", "timeline")),
    page("/tasks/{task}", task.show_task, blocks=("of_task",)),
    page("/files/broken", task.show_broken),
    *asked("/tasks/{task}/backfill", backfills.ask_to_backfill, backfills.backfill),
    *asked("/tasks/{task}/start", start_form.ask_to_start, start_form.start),
    *asked("/tasks/{task}/pause", tasks.ask_to_pause, tasks.pause),
    *asked("/tasks/{task}/resume", tasks.ask_to_resume, tasks.resume),
    *asked("/tasks/{task}/mute", tasks.ask_to_mute, tasks.mute),
    action("/tasks/{task}/unmute", tasks.unmute),
    page("/tasks/{task}/keys", keys.show_keys, blocks=("of_keys",)),
    page("/calendars", calendars.show_calendars),
    page("/calendars/{name}", calendars.show_calendar),
    page("/maintenance", maintenance.show_maintenance),
    *asked("/maintenance/pause", maintenance.ask_to_pause, maintenance.pause),
    *asked("/maintenance/mute", maintenance.ask_to_mute, maintenance.mute),
    *asked("/maintenance/{window}/end", maintenance.ask_to_end, maintenance.end),
    page("/runs", runs.show_runs),
    download("/runs/file", runs.download_runs),
    *asked("/runs/bulk/retry", partial(bulks.ask, "retry"), bulks.begin),
    *asked("/runs/bulk/cancel", partial(bulks.ask, "cancel"), bulks.begin),
    *asked("/runs/bulk/acknowledge", partial(bulks.ask, "acknowledge"), bulks.begin),
    page("/bulks/{bulk}", bulks.show_bulk, blocks=("bulk",)),
    *asked("/bulks/{bulk}/undo", bulks.ask_to_undo, bulks.begin),
    page("/runs/{run}", runs.show_run),
    download("/runs/{run}/log.txt", run_parts.download_log),
    page("/runs/{run}/attempts/{fence}", run_parts.show_attempt),
    *asked("/runs/{run}/redrive", run_parts.ask_to_redrive, run_parts.redrive),
    *asked("/runs/{run}/cancel", run_actions.ask_to_cancel, run_actions.cancel),
    *asked("/runs/{run}/retry", run_actions.ask_to_retry, run_actions.retry),
    *asked("/runs/{run}/acknowledge", run_actions.ask_to_acknowledge, run_actions.acknowledge),
    *asked("/incidents/{incident}/retry", actions.ask_to_retry, actions.retry),
    *asked("/incidents/{incident}/acknowledge", actions.ask_to_acknowledge, actions.acknowledge),
    page("/incidents", listing.show_incidents),
    download("/incidents/file", listing.download_incidents),
    download("/incidents/{incident}/why.txt", room.download_text),
    page("/incidents/{incident}", room.show_incident),
    action("/incidents/{incident}/reopen", actions.reopen),
    *asked("/slots/leave", left_slots.ask_to_leave, left_slots.leave),
    action("/slots/reopen", left_slots.reopen),
    *asked("/backfill", outage_backfills.ask, outage_backfills.begin),
    page("/search", search.show_search, blocks=("found",)),
    page("/backups", backups.show_backups),
    page("/backups/diff", backups.show_differences, "operator"),
    *asked("/backups/{name}/verify", backups.ask_to_verify, backups.verify),
    action("/backups/{name}/pin", backups.pin, "admin"),
    action("/backups/{name}/unpin", backups.unpin, "admin"),
    download("/backups/{name}/download", backups.download, "admin"),
    page("/nodes", system.show_nodes, blocks=("pools", "all_nodes")),
    page("/changes", changes.show_changes),
    download("/changes/file", changes.download),
    live,
    page("/you", sign_in.show_you),
    action("/you/tokens", sign_in.make_token, "admin", sign_in.show_you),
    action("/you/tokens/revoke", sign_in.revoke_token, "admin"),
    action("/you/sessions/end", sign_in.end_a_session, "viewer"),
    action("/you/signout", sign_in.sign_out, "viewer"),
    PageRoute("/signin", sign_in.show_sign_in, methods=["GET"], include_in_schema=False),
    PageRoute("/signin", sign_in.sign_in, methods=["POST"], include_in_schema=False),
    PageRoute("/preferences", set_preferences, methods=["POST"], include_in_schema=False),
    PageRoute("/runs/views", save_view, methods=["POST"], include_in_schema=False),
    PageRoute("/static/{name}", _static, methods=["GET"], include_in_schema=False),
]
