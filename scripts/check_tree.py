"""Refuses what must not be in the repository: names of package registries, paths of somebody's machine, keys.

It reads every file that git tracks or would track. A lock names packages and hashes only, so that it serves behind any
mirror; a path of one machine works on no other. What the code means or does is not looked at here.
"""

import re
import subprocess
import sys
from pathlib import Path

FORBIDDEN = {
    "the host name of a package registry": re.compile(
        r"pypi[.]org|python[h]osted[.]org|registry[.]npmjs[.]org|registry[.]yarnpkg[.]com|static[.]crates[.]io"
        r"|proxy[.]golang[.]org|conda[.]anaconda[.]org|deb[.]debian[.]org"
    ),
    "a path of one machine": re.compile(
        r"(?<![\w.$}/-])/(?:work|root|opt/pypi|tmp/bash_jobs)/|/home/(?!you\b|marketsync\b)\w+/"
    ),
    "a private key": re.compile(r"-{5}BEGIN [A-Z ]*PRIVATE KEY-{5}"),
}


def offences(path: Path) -> list[str]:
    """Lists what is wrong with a file, one `path:line: what` each; a file that is not text has nothing to say."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []
    return [
        f"{path}:{number}: {what}: {found.group()}"
        for number, line in enumerate(lines, 1)
        for what, pattern in FORBIDDEN.items()
        if (found := pattern.search(line))
    ]


def main() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = [Path(name) for name in listed.split("\0") if name]
    found = [offence for file in files if file.is_file() and not file.is_symlink() for offence in offences(file)]
    if found:
        sys.exit("\n".join([*found, f"{len(found)} lines hold what must not be in the repository."]))
    print(f"{len(files)} files hold no registry name, no machine path and no key.")


if __name__ == "__main__":
    main()
