"""The framework as one Python file, with a device if asked: to vendor it, or for an appliance.

    python3 -m tools.bundle -o vhost_user.py                  to be imported
    python3 -m tools.bundle --device blk -o vhost-user-blk    to be run: ./vhost-user-blk --socket-path … --blk-file …

The modules follow one another as they are, in the order in which they need each other; what goes is their imports of each other, and
each docstring becomes a banner of comments. The same sources give the same bytes.

One file has one namespace, so that no two modules may mean different things by a name. That, and whatever else would not survive,
is refused with a BundleError.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORK = "vhost_user"
DEVICES = "devices"
RULE = "# " + "=" * 125


class BundleError(Exception):
    """These modules cannot be one file. The message names the place."""


@dataclass
class Module:
    """A source file, and what of it stays behind.

    name      as in imports: vring, devices.blk
    siblings  modules of the bundle that it imports, in order
    imported  (module, name) of what it takes from them
    dropped   top-level statements that the bundle leaves out
    defined   what it binds at top level, and the meaning of each: equal for equal definitions
    """

    name: str
    text: str
    tree: ast.Module
    siblings: list[str] = field(default_factory=list)
    imported: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[ast.stmt] = field(default_factory=list)
    defined: dict[str, str] = field(default_factory=dict)
    public: list[str] = field(default_factory=list)

    @property
    def file(self) -> str:
        """Its path from the root."""
        return self.name.replace(".", "/") + ".py"

    def error(self, node: ast.AST, text: str) -> BundleError:
        """What is wrong, and where."""
        return BundleError(f"{self.file}:{getattr(node, 'lineno', 1)}: {text}")


# ---------------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------------


def read_module(name: str, root: Path = ROOT) -> Module:
    """A module with all that is told about it. Raises BundleError."""
    path = root / (name.replace(".", "/") + ".py")
    try:
        text = path.read_text(encoding="utf-8")
        module = Module(name, text, ast.parse(text, str(path)))
    except (OSError, SyntaxError) as error:
        raise BundleError(f"{path}: {error}") from None
    for statement in module.tree.body:
        _look_at(module, statement, root)
    hidden = {id(node) for statement in module.dropped for node in ast.walk(statement)}
    for node in ast.walk(module.tree):
        if id(node) not in hidden and _sibling_names(node, module, root):
            raise module.error(node, "an import of a module of the bundle; only at top level, alone or in the block that asks for __package__")
    return module


def _look_at(module: Module, statement: ast.stmt, root: Path) -> None:
    imports = _sibling_imports(statement, module, root)
    if imports:
        for name, node in imports:
            if name not in module.siblings:
                module.siblings.append(name)
            for alias in node.names:
                if alias.asname or alias.name == "*":
                    raise module.error(node, f"{alias.name} is imported under another name; in one file it has its own")
                module.imported.append((name, alias.name))
        module.dropped.append(statement)
    elif _is_docstring(module, statement) or (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
        module.dropped.append(statement)
    elif isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == ["__all__"]:
        module.public = list(ast.literal_eval(statement.value))
        module.dropped.append(statement)
    else:
        for name, meaning in _bindings(statement):
            module.defined[name] = meaning


def _is_docstring(module: Module, statement: ast.stmt) -> bool:
    return statement is module.tree.body[0] and ast.get_docstring(module.tree) is not None


def _sibling_imports(statement: ast.stmt, module: Module, root: Path) -> list[tuple[str, ast.ImportFrom]]:
    """The imports of siblings that the statement is, or that the `if` is made of which chooses between flat and packaged."""
    if isinstance(statement, ast.If) and "__package__" in ast.unparse(statement.test):
        parts = [_sibling_imports(part, module, root) for part in statement.body + statement.orelse]
        if not all(parts):
            raise module.error(statement, "this block has more than imports of the bundle's modules")
        return [found for part in parts for found in part]
    names = _sibling_names(statement, module, root)
    return [(name, statement) for name in names if isinstance(statement, ast.ImportFrom)]


def _sibling_names(node: ast.AST, module: Module, root: Path) -> list[str]:
    """The modules below `root` that an import statement names."""
    if isinstance(node, ast.ImportFrom):
        package = module.name.split(".")[: -node.level] if node.level else []
        wanted = [".".join([*package, *(node.module or "").split(".")])]
    elif isinstance(node, ast.Import):
        wanted = [alias.name for alias in node.names]
    else:
        return []
    return [name for name in wanted if (root / (name.replace(".", "/") + ".py")).is_file()]


def _bindings(statement: ast.stmt) -> Iterator[tuple[str, str]]:
    """What a top-level statement binds, compound statements included: each name with its meaning."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name, ast.dump(statement)
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            # `import a.b` binds a, as does `import a.c`: they add up
            yield alias.asname or alias.name.partition(".")[0], f"module {alias.name if alias.asname else alias.name.partition('.')[0]}"
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name, f"{alias.name} of module {statement.module}"
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id, ast.dump(statement)
    else:
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                yield from _bindings(child)
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):  # for, with
                yield child.id, ast.dump(statement)


# ---------------------------------------------------------------------------------------------------------------------------
# Order, and whether it can be
# ---------------------------------------------------------------------------------------------------------------------------


def collect(name: str, root: Path = ROOT) -> list[Module]:
    """The module and all that it imports of the root's, each behind what it needs. Raises BundleError."""
    found: dict[str, Module] = {}
    _collect(name, root, found, ())
    modules = list(found.values())
    _check_names(modules)
    return modules


def _collect(name: str, root: Path, found: dict[str, Module], path: tuple[str, ...]) -> None:
    if name in path:
        raise BundleError(f"modules import each other: {' -> '.join([*path, name])}")
    if name in found:
        return
    module = read_module(name, root)
    for sibling in sorted(module.siblings):
        _collect(sibling, root, found, (*path, name))
    found[name] = module


def _check_names(modules: Sequence[Module]) -> None:
    """Refuse names that mean two things, and leave out what an earlier module has defined in the same words."""
    owners: dict[str, Module] = {}
    for module in modules:
        for name, meaning in module.defined.items():
            owner = owners.setdefault(name, module)
            if owner.defined[name] != meaning:
                raise BundleError(f"{name} is one thing in {owner.file} and another in {module.file}: one of them needs another name")
            if hasattr(builtins, name):
                raise BundleError(f"{name} of {module.file} would hide Python's own {name} from all other modules")
        for sibling, name in module.imported:
            if name not in owners:
                raise BundleError(f"{module.file} imports {name} from {sibling}, which does not define it at top level")
        for statement in module.tree.body:
            names = [name for name, _ in _bindings(statement)]
            again = [name for name in names if owners.get(name, module) is not module]
            if again and not isinstance(statement, (ast.Import, ast.ImportFrom)):
                if again != names:
                    raise module.error(statement, f"{', '.join(again)} defined again, together with {', '.join(names)}")
                # Once is enough, and twice may be wrong: a second ctypes.CDLL has not the first one's argument types.
                module.dropped.append(statement)


# ---------------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------------


def bundle(device: str | None = None, root: Path = ROOT) -> str:
    """The source of the one file. Raises BundleError."""
    modules = collect(f"{DEVICES}.{device}" if device else FRAMEWORK, root)
    if FRAMEWORK not in [module.name for module in modules]:
        raise BundleError(f"{modules[-1].file} does not use {FRAMEWORK}.py: is it a device?")
    parts = [_head(device, modules), *(_section(module, last=module is modules[-1]) for module in modules)]
    text = "\n\n\n".join(part.strip("\n") for part in parts) + "\n"
    compile(text, "<bundle>", "exec", dont_inherit=True)  # what cannot be compiled is not written
    return text


def _head(device: str | None, modules: Sequence[Module]) -> str:
    what = f"vhost-user-{device}: a virtio device for a VMM" if device else "A framework for vhost-user back-ends"
    use = "Run it: --help tells its options. Or import it: it has the framework's names too." if device else "Import it in place of vhost_user."
    public = sorted({name for module in modules for name in module.public})
    names = "".join(f'    "{name}",\n' for name in public)
    return f'''#!/usr/bin/env python3
"""{what}, in pure Python, in one file. Needs CPython 3.10 or newer on Linux, and nothing else.

{use}

Made by tools/bundle.py of {", ".join(module.file for module in modules)}: change those, not this.
Licensed under the Apache License, Version 2.0.
"""

from __future__ import annotations

__all__ = [
{names}]
'''


def _section(module: Module, last: bool) -> str:
    docstring = ast.get_docstring(module.tree) or ""
    banner = [RULE, f"# {module.file}", "#", *(f"# {line}".rstrip() for line in docstring.splitlines()), RULE]
    return "\n".join(banner) + "\n\n" + _body(module, last)


def _body(module: Module, last: bool) -> str:
    """The module's text without what is dropped, line for line."""
    lines: list[str | None] = list(module.text.splitlines())
    if lines and (lines[0] or "").startswith("#!"):
        lines[0] = None
    gone = {id(statement) for statement in module.dropped}
    for statement in module.tree.body:
        if not last and isinstance(statement, ast.If) and "__main__" in ast.unparse(statement.test):
            raise module.error(statement, "a program in the middle of the file")
        span = range(statement.lineno - 1, statement.end_lineno or statement.lineno)
        if id(statement) in gone:
            for number in span:
                lines[number] = None
        elif any(lines[number] is None for number in span):
            raise module.error(statement, "shares a line with a statement that is left out")
    return _squeeze([line for line in lines if line is not None])


def _squeeze(lines: Sequence[str]) -> str:
    """At most two empty lines in a row, as there would have been without what was left out."""
    kept: list[str] = []
    for line in lines:
        if line or any(kept[-2:]):
            kept.append(line)
    return "\n".join(kept).strip("\n")


def devices(root: Path = ROOT) -> list[str]:
    """The devices that there are: programs, not what they import."""
    files = [path for path in (root / DEVICES).glob("*.py") if not path.stem.startswith(("_", "test_"))]
    return sorted(path.stem for path in files if "\nif __name__ ==" in path.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.bundle", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=devices(), help="put this device in, and make the file its program")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write; - for standard output")
    arguments = parser.parse_args(argv)
    try:
        text = bundle(arguments.device)
        if arguments.output == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.output).write_bytes(text.encode())
            os.chmod(arguments.output, 0o755 if arguments.device else 0o644)
    except (BundleError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
