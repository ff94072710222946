"""A diagnosis as one page of text, or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tpcolocate._version import __version__
from tpcolocate.doctor.facts import Facts
from tpcolocate.doctor.findings import PROBLEM, WARNING, Diagnosis, Finding
from tpcolocate.groups import list_ranks

_WIDTH = 110
_INDENT = 25


def render(diagnosis: Diagnosis, *, world_size: int, tp_size: int) -> str:
    """Return the page."""
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    lines = [f"tpcolocate {__version__} doctor: {ranks}, tp_size {tp_size}", ""]
    for finding in diagnosis.findings:
        lines += _lines(finding, show_ranks=0 < len(finding.ranks) < world_size)
    if diagnosis.slices:
        lines += ["", *_slices(diagnosis)]
    numbers = [sum(finding.level == level for finding in diagnosis.findings) for level in (PROBLEM, WARNING)]
    problems, warnings = (f"{n} {what}{'' if n == 1 else 's'}" for n, what in zip(numbers, ("problem", "warning")))
    return "\n".join([*lines, "", f"{problems}, {warnings}"])


def _lines(finding: Finding, *, show_ranks: bool) -> list[str]:
    where = f"rank{'' if len(finding.ranks) == 1 else 's'} {list_ranks(finding.ranks)}: " if show_ranks else ""
    text = " ".join(f"{where}{finding.message}".split())
    head = f"{finding.level:<9}{finding.check.replace('_', ' '):<{_INDENT - 9}}"
    lines = textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * _INDENT, break_on_hyphens=False)
    if finding.fix is not None:
        indent = " " * _INDENT
        fix = " ".join(finding.fix.split())
        lines += textwrap.wrap(
            fix, _WIDTH, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ", break_on_hyphens=False
        )
    return lines


def _slices(diagnosis: Diagnosis) -> list[str]:
    title = "Slices that init() would make" + (
        f", with {len(diagnosis.members)} ranks on this host" if diagnosis.assumed else ""
    )
    lines = [title]
    hosts = {member.rank: member.host.name for member in diagnosis.members}
    for index, roles in enumerate(diagnosis.slices):
        where = f"devices {','.join(roles.visible_devices)}" if roles.visible_devices else "CPU"
        lines.append(
            f"  slice {index}: ranks {list_ranks(roles.ranks)} in tp order, owner {roles.owner_rank}, "
            f"{where}, host {hosts[roles.owner_rank]}"
        )
    return lines


def as_json(diagnosis: Diagnosis, found: Sequence[Facts], *, world_size: int, tp_size: int) -> str:
    """Return everything, facts included, as one JSON object."""
    document: dict[str, Any] = {
        "version": __version__,
        "level": diagnosis.level,
        "world_size": world_size,
        "tp_size": tp_size,
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "slices": [asdict(roles) for roles in diagnosis.slices],
        "slices_assumed": diagnosis.assumed,
        "ranks": [asdict(facts) for facts in found],
    }
    return json.dumps(document, indent=1)


__all__ = ["as_json", "render"]
