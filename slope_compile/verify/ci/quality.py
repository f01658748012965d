"""GitLab's code quality report: what its merge requests show. The form that Code Climate's engines have."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from slope_compile.verify.ci.sarif import fingerprint
from slope_compile.verify.ci.verified import Finding, Verified


def code_quality(verified: Verified) -> bytes:
    """Return each reason for the verdict `fail` as an issue; an empty list where there is none."""
    issues = [
        {
            "description": f"{finding.title}: {finding.detail}",
            "check_name": f"slope-compile/{finding.check}",
            "fingerprint": fingerprint(finding),
            "severity": "critical",
            "location": {"path": _path(finding), "lines": {"begin": 1}},
        }
        for finding in verified.findings()
    ]
    return json.dumps(issues, indent=1, allow_nan=False).encode() + b"\n"


def _path(finding: Finding) -> str:
    """GitLab takes paths inside the repository alone: of another one the name is told."""
    path = PurePosixPath(finding.file)
    return path.name if path.is_absolute() or ".." in path.parts else path.as_posix()
