"""What the wheel and the source distribution hold: `python .ci/package.py DIST`. Ends with an error for what is amiss."""

from __future__ import annotations

import email
import re
import sys
import tarfile
import zipfile
from pathlib import Path

dist = Path(sys.argv[1])
(wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
tree = Path(__file__).parents[1]
problems = []


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        problems.append(otherwise)


with zipfile.ZipFile(wheel) as file:
    inside = {name: file.read(name) for name in file.namelist()}
own = {name for name in inside if ".dist-info/" not in name}
source = {str(path.relative_to(tree)) for path in (tree / "anyarray_linear").rglob("*") if path.is_file()}
source = {name for name in source if not name.endswith((".pyc", ".pyo"))}
expect(own == source, f"the wheel differs from the package: {sorted(own ^ source)}")
(info,) = (name.partition("/")[0] for name in inside if name.endswith(".dist-info/METADATA"))
metadata = email.message_from_bytes(inside[f"{info}/METADATA"])
expect(metadata["License-Expression"] == "MIT AND CC-BY-4.0", f"the licence is {metadata['License-Expression']}")
licences = set(metadata.get_all("License-File") or ())
for name in ("LICENSE", "LICENSES/CC-BY-4.0.txt", "anyarray_linear/datasets/LICENSE.txt"):
    expect(name in licences and f"{info}/licenses/{name}" in inside, f"the wheel has no licence file {name}")
relative = re.findall(r"\]\((?!https?://|#|mailto:)([^)]*)\)", metadata.get_payload())
expect(not relative, f"links of the README lead nowhere on an index page: {relative}")
expect(metadata["Requires-Python"] is not None, "the wheel does not say which Python it needs")
required = {line for line in metadata.get_all("Requires-Dist") or () if "extra ==" not in line}
names = {re.split(r"[^\w.-]", line)[0] for line in required}
expect(names == {"numpy", "array-api-compat"}, f"without an extra, the wheel requires {sorted(required)}")

with tarfile.open(sdist) as file:
    held = {name.partition("/")[2] for name in file.getnames()}
for name in ("tests/conftest.py", "benchmarks/__main__.py", "docs/index.md", "docker/Dockerfile", "LICENSES/CC-BY-4.0.txt"):
    expect(name in held, f"the source distribution has no {name}")
stray = [name for name in held if re.search(r"__pycache__|\.so$|(^|/)(runs|site|\.venv|\.git)(/|$)|^results/", name)]
expect(not stray, f"the source distribution has {stray}")

print(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 1e3:.0f} kB; {sdist.name}: {len(held)} files")
for problem in problems:
    print(problem, file=sys.stderr)
sys.exit(len(problems) > 0)
