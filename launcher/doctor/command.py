"""`occult doctor`: look at the hosts, measure what joins them, and say what is wrong."""

import json
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from occult_train.config import Config, load
from occult_train.errors import UserError, writing
from occult_train.jobfiles import JobFiles, new_launch
from occult_train.launcher import hostfile, plan, train
from occult_train.launcher.doctor import judge, links, memory, report
from occult_train.launcher.doctor.host import Host, ask
from occult_train.launcher.job import Job

JOB_SECONDS = 90.0
"""After which measuring is given up, starting and importing included."""
WIDTH = 160
"""Of tables, at most, that are not printed on a wider terminal."""
CPU_RANKS = 2
"""Of this machine alone, without GPUs or settings."""


def examine(settings: list[str], options: plan.Options, output: Path | None) -> int:
    """Print what was found; 0 if all is well, else 1.

    Args:
        settings: of a run whose memory need is estimated; empty for none.
        options: which hosts, as of `occult train`.
        output: takes everything as JSON.

    Raises:
        UserError: settings, options or hostfile are wrong.
        KeyboardInterrupt: it was stopped while it measured.
    """
    config = load(settings) if settings else None
    slots = _slots(options, config)
    hosts = ask(slots, config.output if config else ".")
    need = memory.estimate(config, sum(map(len, slots.values())), hosts) if config else None
    console = Console(width=max(Console().width, WIDTH), highlight=False)
    console.print(report.hosts_table(hosts))
    console.print(report.usual_line(hosts), markup=False, soft_wrap=True)
    findings = judge.of_hosts(hosts, need.disk if need else judge.DISK_BYTES)
    found, trouble = _measure(options, [host for host in hosts if host.facts is not None])
    for owner, names, rates in _matrices(found, hosts):
        where = f"inside {owner}" if owner else "between hosts"
        console.print(f"\n{where}, GB/s each way: all-to-all / all-reduce", soft_wrap=True)
        console.print(report.links_table(names, rates))
        if found["device"] == "cuda" or not owner:  # inside a host without GPUs it is the cores that are slow
            findings += judge.of_links([f"{owner} {name}".strip() for name in names], **rates)
    findings += [trouble] if trouble else []
    if need:
        console.print(need.words, soft_wrap=True)
        findings += need.findings
    for line in findings:
        console.print(f"wrong: {line}", style="bold", markup=False, soft_wrap=True)
    if not findings:
        console.print("all is well")
    if output is not None:
        with writing(f"--json={output}"):
            content = report.as_json(hosts, found, asdict(need) if need else {}, findings)
            output.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if findings else 0


def _slots(options: plan.Options, config: Config | None) -> hostfile.Slots:
    """Of the hosts that are looked at."""
    if path := plan.hostfile_of(options):
        hosts = hostfile.read(path)
        return hostfile.select(hosts, options.include, options.exclude, options.num_nodes, options.num_gpus)
    return plan.spread(options, _expert(config)).slots


def _expert(config: Config | None) -> int:
    return config.parallel.expert if config else CPU_RANKS


def _measure(options: plan.Options, hosts: list[Host]) -> tuple[dict[str, Any], str]:
    """What the ranks found on hosts that answered, and what kept them from it."""
    if sum(len(host.slots) for host in hosts) < 2:
        return {}, ""
    slots = {host.name: host.slots for host in hosts}
    try:
        if plan.hostfile_of(options):
            options = plan.only(options, slots)
            made = plan.spread(options, 0)
        else:
            made = plan.spread(options, len(hosts[0].slots))
    except UserError as error:
        return {}, f"ranks cannot be started: {error}"
    with tempfile.TemporaryDirectory(prefix="occult-doctor-") as folder, tempfile.TemporaryFile() as said:
        files = JobFiles(folder, new_launch())
        files.create()
        arguments = [f"--slots={','.join(str(len(numbers)) for numbers in made.slots.values())}"]
        words = train.command(arguments, options, made, files, links.__name__)
        others = [host for host in made.slots if made.multi_host and not hostfile.is_this_machine(host)]
        job = Job(words, train.environment(made), files, made.multi_host, others, said, JOB_SECONDS)
        job.run()
        if job.ended:
            raise KeyboardInterrupt
        said.seek(0)
        return _read(said.read().decode(errors="replace"))


def _read(text: str) -> tuple[dict[str, Any], str]:
    """What rank 0 found in what ranks printed, or the first error."""
    lines = [json.loads(line) for line in re.findall(re.escape(links.MARK) + r"(\{.*\})", text)]
    for line in lines:
        if "error" not in line:
            return line, "" if line["complete"] else "not all links were measured in time; try fewer hosts (--include)"
    last = lines[0]["error"] if lines else (text.strip().splitlines() or ["they said nothing"])[-1]
    return {}, f"links cannot be measured, and training would not start either: {last}"


def _matrices(found: dict[str, Any], hosts: list[Host]) -> list[tuple[str, list[str], dict[str, Any]]]:
    """The host that each matrix is inside of (empty for that of hosts), its sides' names, and its rates."""
    answered = [host for host in hosts if host.facts is not None]
    if not found:
        return []
    kind = "GPU" if found["device"] == "cuda" else "rank"
    across = [("", [host.name for host in answered], found["across"])] if len(answered) > 1 else []
    inside = [
        (host.name, [f"{kind} {slot}" for slot in host.slots], rates)
        for host, rates in zip(answered, found["inside"], strict=True)
        if len(host.slots) > 1
    ]
    return [*across, *inside]
