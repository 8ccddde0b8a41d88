"""The documentation against the code: links, TOML blocks, options, names of keys and files, Python calls, tables."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomli

import titanmoe
from titanmoe.config import ConfigError, resolve, validate_keys
from titanmoe.config.files import train_configs_folders
from titanmoe.config.schema import Schema
from titanmoe.metrics import model_sizes
from titanmoe.models.family import FAMILIES, get_family

CHECKOUT = Path(__file__).parents[1]
PAGES = [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((CHECKOUT / "docs").rglob("*.md"))
SCHEMA = Schema.of_job_config()
PROGRAMS = ("./run_train.sh", "titanmoe config", "python -m titanmoe.launch", "python -m titanmoe.train")
FILE_ENDINGS = ("json", "jsonl", "toml", "md", "py", "safetensors", "bin", "distcp", "sh", "html", "log")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, language and text."""

    page: str
    language: str
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


@cache
def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        for _, kind, text in re.findall(r"^(```+)(\w*)\n(.*?)^\1$", page.read_text(), re.MULTILINE | re.DOTALL):
            found.append(Block(name_of(page), kind, text))
    assert all(block.language for block in found), "every fenced block names its language"
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^(```+)\w*\n.*?^\1$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands in backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert CHECKOUT in target.parents
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}: there are {sorted(anchors(target))}"


def test_every_page_is_in_the_index() -> None:
    index = (CHECKOUT / "docs" / "README.md").read_text()
    missing = [page.name for page in (CHECKOUT / "docs").glob("*.md") if f"({page.name})" not in index]
    assert missing == ["README.md"]


@pytest.mark.parametrize("block", blocks("toml"), ids=lambda block: block.page)
def test_toml_blocks_are_valid_configs(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(block.text)
    resolved = resolve(["--job.config_file", str(file)])
    validate_keys(resolved.config)
    assert not resolved.notes, "an example sets nothing that has no effect"


def options_of(line: str) -> list[str] | None:
    """The arguments of a line of shell that starts a command of ours; None for another line."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    for program in PROGRAMS:
        number = len(program.split())
        if " ".join(words[:number]) == program:
            return words[number:]
    return None


def without_absent_files(options: list[str]) -> list[str]:
    """The user's own config files in examples do not exist; those of train_configs/ do."""
    shipped = {file.name for folder in train_configs_folders() for file in folder.glob("*.toml")}
    kept, rest = [], list(options)
    while rest:
        option = rest.pop(0)
        if option == "--job.config_file":
            option += "=" + rest.pop(0)
        if not option.startswith("--job.config_file=") or option.partition("=")[2] in shipped:
            kept.append(option)
    return kept


def test_commands_in_shell_blocks_are_understood() -> None:
    num_options = 0
    for block in blocks("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            options = [one for one in options_of(line) or [] if one not in ("--help", "--explain")]
            num_options += len(options)
            try:
                validate_keys(resolve(without_absent_files(options)).config)
            except ConfigError as error:
                pytest.fail(f"{block.page}: {line}: {error}")
    assert num_options > 20


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_and_options_in_the_text_exist(page: Path) -> None:
    """`section.key`, `section.key = value`, `--section.key...` and `[section]` name what there is."""
    file_keys = file_patterns()
    for span in spans(page):
        if span.startswith("--") and "." in span.split("=")[0]:
            resolve([] if span.startswith("--job.config_file") else shlex.split(span))
        elif match := re.fullmatch(r"\[([a-z_.]+)\]", span):
            assert match[1] in SCHEMA.sections, f"{name_of(page)}: {span}"
        elif match := re.fullmatch(r"([a-z_]+(?:\.\w+)+)( = .+)?", span):
            path = match[1]
            is_file = path.rpartition(".")[2] in FILE_ENDINGS
            if path.partition(".")[0] not in SCHEMA.sections or is_file or path in file_keys:
                continue
            assert path in SCHEMA.keys or path in SCHEMA.sections, f"{name_of(page)}: there is no key {path}"


def file_patterns() -> set[str]:
    families = [get_family(name) for name in FAMILIES]
    return {rule.file_pattern for family in families for rules in family.layouts for rule in rules}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(r"(titanmoe|tests|scripts|train_configs|docs)/[\w./]*", span) and span != "docs/records/":
            assert (CHECKOUT / span).exists(), f"{name_of(page)} names {span}"


def test_modules_that_are_started_exist() -> None:
    for page in PAGES:
        for module in re.findall(r"python -m (titanmoe[\w.]*\w)", page.read_text()):
            assert find_spec(module), f"{name_of(page)}: python -m {module}"


def test_python_blocks_use_what_there_is() -> None:
    """Every import works, every public name exists, and calls of public functions fit their signatures."""
    num_calls = 0
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                if node.module.startswith(("titanmoe", "tests")):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), f"{block.page}: {node.module}"
            if isinstance(node, ast.Call) and re.fullmatch(r"titanmoe\.\w+", ast.unparse(node.func)):
                name = ast.unparse(node.func).removeprefix("titanmoe.")
                assert name in titanmoe.__all__, f"{block.page}: titanmoe.{name}"
                keywords = {str(keyword.arg): None for keyword in node.keywords}
                inspect.signature(getattr(titanmoe, name)).bind(*(None for _ in node.args), **keywords)
                num_calls += 1
    assert num_calls >= 5


@pytest.mark.parametrize("args", [[], ["--published"]])
def test_the_tables_of_sizes_are_what_their_command_prints(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model_sizes.main(args)
    printed = capsys.readouterr().out
    assert printed.count("\n") > 10
    assert printed in (CHECKOUT / "docs" / "models.md").read_text()


def test_the_page_on_config_is_complete() -> None:
    """Every section, every key and default that torchtitan does not have, and every feature still refused."""
    text = " ".join((CHECKOUT / "docs" / "config.md").read_text().split())
    unnamed = [section for section in SCHEMA.sections if "." not in section and f"`[{section}]`" not in text]
    assert not unnamed
    defaults = tomli.loads((CHECKOUT / "tests" / "config" / "torchtitan_defaults.toml").read_text())
    theirs = {f"{section}.{name}" for section, table in defaults.items() for name in table}
    ours = {path for path in SCHEMA.keys if path.count(".") == 1 and path not in theirs}
    refused = {path for path, key in SCHEMA.keys.items() if key.limits.later}
    assert ours and refused
    assert not [path for path in sorted(ours | refused) if f"`{path}`" not in text]
    listed = set(re.findall(r"`([^`]+)`", text.partition("## Not supported yet")[2]))
    assert listed == refused, "what is supported by now is not listed as missing"


def test_prose_fits_120_columns() -> None:
    lines = [(page, line) for page in PAGES for line in prose(page).splitlines()]
    assert not [f"{name_of(page)}: {line}" for page, line in lines if len(line) > 120 and not line.startswith("|")]
