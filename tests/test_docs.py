"""README.md and docs/: links lead somewhere, code parses, and commands name files, flags and fields that there are."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from gla_jax.config import ConfigError, load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(
    r"(?:python3?|\.venv/bin/python|-np \d \S+ \S+ python) +(train\.py|benchmarks/\w+\.py|-m +gla_jax[\w.]*)(.*)"
)
FLAG = re.compile(r"(?<!\S)--([\w.\-]+)(?:=|\b)(\"[^\"]*\"|'[^']*'|[^\s'\"]*)")
PLACEHOLDER = re.compile(r"\.\.\.|\$|[A-Z]{2,}|mine\.py")


def mistakes(text, page):
    """Return what is wrong with a page, a sentence each."""
    return [*links(text, page), *python_blocks(text), *commands(text), *files(text), *extras(text)]


def links(text, page):
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = page.parent / path if path else page
        if not file.exists():
            yield f"the link {target} leads nowhere"
        elif anchor and anchor not in [slug(line) for line in file.read_text().splitlines() if line.startswith("#")]:
            yield f"the link {target} leads to no heading"


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip("# ").lower()).replace(" ", "-")


def python_blocks(text):
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            yield f"code does not parse: {error}"
            continue
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)):
            try:
                exec(ast.unparse(node), {})
            except ImportError as error:
                yield f"{ast.unparse(node)}: {error}"


def commands(text):
    """Check every command of ours, in blocks and in the middle of sentences."""
    for match in COMMAND.finditer(re.sub(r"\\\n\s*", " ", text)):
        program, rest = match[1], re.split(r"`| \||\||&&| #| > |\d?>|;|'$|\"$", match[2])[0]
        name = program.split()[-1]
        file = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
        if not file.is_file():
            yield f"there is no {program}"
            continue
        given = FLAG.findall(rest)
        for flag, _ in given:
            if not flag.startswith("config.") and flag not in flags_of(file):
                yield f"{program} has no --{flag}"
        yield from config_mistakes(dict(given))
    for field, value in re.findall(r"`--config\.([\w.]+)=([^`]*)`", text):
        yield from config_mistakes({"config": "configs/quickstart.py", f"config.{field}": value.split()[0]})


def config_mistakes(given):
    values = {name: value.strip("'\"") for name, value in given.items()}
    path = values.get("config")
    if path is None:
        return
    overrides = {
        name.removeprefix("config."): value
        for name, value in values.items()
        if name.startswith("config.") and not PLACEHOLDER.search(value)
    }
    path = "configs/quickstart.py" if PLACEHOLDER.search(path) else path
    try:
        load(str(ROOT / path), overrides)
    except ConfigError as error:
        yield str(error)


def flags_of(file):
    """Return the flags that a program defines, without running it: several define the same ones."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call) and node.args]
    names = [
        call.args[0].value.lstrip("-")
        for call in calls
        if isinstance(call.func, ast.Attribute) and re.match(r"DEFINE_|add_argument", call.func.attr)
        if isinstance(call.args[0], ast.Constant)
    ]
    return {"help", *names, *(f"no{name}" for name in names)}


def files(text):
    """Check names of files of this repository, wherever they stand."""
    for name in re.findall(
        r"\b((?:configs|benchmarks|tests|notebooks|gla_jax|pallas_kernels)/[\w./]*\w\.(?:py|jsonl?|ipynb))", text
    ):
        if not (ROOT / name).exists():
            yield f"there is no {name}"


def extras(text):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"(?:'|\")?(?:\.|gla-jax)\[([\w,]+)\]", text):
        for name in group.split(","):
            if name not in known:
                yield f"there is no extra {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page):
    assert not list(mistakes(page.read_text(), page))


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("[here](nowhere.md)", "leads nowhere"),
        ("[here](scale.md#no-such-heading)", "no heading"),
        ("```python\nx = = 1\n```", "does not parse"),
        ("```python\nfrom gla_jax import load_modle\n```", "load_modle"),
        ("    python -m gla_jax.plans --devices=8", "there is no -m gla_jax.plans"),
        ("    python -m gla_jax.plan --devics=8", "has no --devics"),
        ("    python train.py --config=configs/quickstart.py \\\n        --config.model.hiden_size=8", "hidden_size"),
        ("say `python train.py --config=none.py --workdir=x`", "no such file"),
        ("`--config.mesh.fdsp=2`", "mesh.fsdp"),
        ("see tests/test_nothing.py", "there is no tests/test_nothing.py"),
        ("pip install 'gla-jax[everything]'", "no extra everything"),
    ],
)
def test_a_mistake_is_found(text, mistake):
    found = list(mistakes(text, ROOT / "docs/page.md"))
    assert len(found) == 1 and mistake in found[0]
