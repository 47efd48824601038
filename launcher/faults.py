"""The last words of a launch: which rank failed, why, and where the report lies."""

import signal

from occult_train.jobfiles import Failure, JobFiles


def explain(code: int, files: JobFiles) -> str:
    """What to tell the user about an exit code other than 0; empty where all has been said.

    Args:
        code: of the job.
        files: of its launch.
    """
    failure = files.failure()
    if failure is None:
        return _without_report(code)
    if failure.kind in ("user", "stopped"):
        return ""
    return f"occult: {_headline(failure)}\noccult: full report: {files.report}"


def _headline(failure: Failure) -> str:
    if failure.kind == "lost":
        return f"{failure.where}: {failure.message}"
    return f"{failure.where} failed: {failure.message}"


def _without_report(code: int) -> str:
    """A job that wrote nothing: its ranks never came up, or one was killed."""
    if code == 2:
        return ""  # a mistake in what was typed, already said
    number = next((n for n in (256 - code, code - 128) if n in set(signal.Signals)), 0)
    cause = f", killed by {signal.Signals(number).name}" if number else ""
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    return f"occult: the job ended without a report from a rank: exit code {code}{cause}{hint}"
