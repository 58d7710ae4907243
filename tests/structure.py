"""How large the package is and how it hangs together.

python -m tests.structure prints the figures and writes CONTRIBUTING.md's table;
structure_test.py holds their limits.
"""

import ast
import functools
import pathlib

from experiments.tools import markdown

PACKAGE = pathlib.Path(__file__).parent.parent / "resnet_flax"

# What one reads from the command line to the new parameters of
# `configs/v1_depth20.py`, in this order.
READING_PATH = (
  "main.py",
  "run/process.py",
  "run/command_line.py",
  "run/config.py",
  "train.py",
  "parallel/program.py",
  "parallel/networks.py",
  "parallel/mesh.py",
  "run/experiment.py",
  "step.py",
  "models/registry.py",
  "models/resnet.py",
  "models/blocks.py",
  "models/stems.py",
  "models/layers.py",
  "optim/optimizers.py",
  "optim/learning_rates.py",
  "data/dataset.py",
  "data/types.py",
  "data/augment.py",
  "data/normalize.py",
  "data/randomness.py",
)

# Layers from top to bottom. A module imports from its own layer and from those
# below it; `BASE` may be imported by all.
LAYERS = (
  {"main", "compare", "convert", "export", "predict", "report"},
  {"tools", "train"},
  {"run"},
  {"parallel"},
  {"step"},
  {"models", "data", "optim"},
)
BASE = {
  *("run.errors", "run.files", "run.process", "run.signals"),
  *("run.environment", "run.surroundings"),
}


def modules() -> dict[str, pathlib.Path]:
  """The package's modules by their names, such as 'run.errors'."""
  found = {}
  for path in sorted(PACKAGE.rglob("*.py")):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    found[name] = path
  return found


@functools.cache
def imports() -> dict[str, set[str]]:
  """For each module the package's modules that it imports at module level."""
  known = modules()
  graph = {}
  for name, path in known.items():
    found = set()
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.ImportFrom) and node.module:
        base, _, rest = node.module.partition(".")
        if base == "resnet_flax":
          for alias in node.names:
            inner = f"{rest}.{alias.name}".strip(".")
            found.add(inner if inner in known else rest)
    graph[name] = found - {name, ""}
  return graph


def longest_chain() -> list[str]:
  """The longest chain of imports; fails where there is a circle."""

  @functools.cache
  def below(name: str) -> tuple[str, ...]:
    chains = [below(each) for each in imports()[name]]
    return (name, *max(chains, key=len, default=()))

  return list(max(map(below, imports()), key=len))


def layer_of(name: str) -> int:
  """The number of a module's layer: the top layer is 0, `BASE` is last."""
  if name in BASE or name.startswith("models.kernels"):
    return len(LAYERS)
  top = name.partition(".")[0]
  return next(k for k, layer in enumerate(LAYERS) if top in layer)


def num_lines(path: pathlib.Path) -> int:
  """Lines of a file, comments and empty ones included."""
  return len(path.read_text().splitlines())


def entries() -> list[str]:
  """The entries at the top of the package, without the command modules."""
  return [
    path.name
    for path in sorted(PACKAGE.iterdir())
    if path.name not in ("__pycache__", "__init__.py", "py.typed", "configs")
    and not (path.suffix == ".py" and num_lines(path) < 20)
  ]


def functions() -> list[tuple[int, str]]:
  """The lines of each function and its name, the longest first."""
  found = []
  for name, path in modules().items():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        found.append((lines, f"{name}.{node.name}"))
  return sorted(found, reverse=True)


def reading_path() -> str:
  """The lines of `READING_PATH`, as Markdown."""
  sizes = {f"`{name}`": num_lines(PACKAGE / name) for name in READING_PATH}
  sizes["together"] = sum(sizes.values())
  return markdown.table(("file", "lines"), sizes.items())


def main() -> None:
  """Prints all figures; writes the reading path."""
  total = sum(map(num_lines, modules().values()))
  print(f"lines of the package: {total}")
  table = reading_path()
  print(f"from the command line to the new parameters:\n{table}")
  path = PACKAGE.with_name("CONTRIBUTING.md")
  markdown.update(path, "reading path", "python -m tests.structure", table)
  print(f"entries at the top: {len(entries())}: {', '.join(entries())}")
  chain = longest_chain()
  print(f"floors of imports: {len(chain)}: {' -> '.join(chain)}")
  print("longest functions:")
  for lines, name in functions()[:5]:
    print(f"  {lines:4} {name}")


if __name__ == "__main__":
  main()
