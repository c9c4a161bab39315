"""Every rule of the catalogue at the same two tasks, with an engine inside this process."""

from pathlib import Path

from rich.console import Console
from rich.progress import track

import optserve
from optserve import optim
from optserve_server.demo import digits, plots, tuning
from optserve_server.demo.lesson import teach
from optserve_server.demo.plane import descend


def compare(*, steps: int = 1000, seed: int = 0, output: Path = Path("optserve-compare")) -> list[Path]:
    """Draw every rule's way down a valley, `<output>-paths.png`, and its loss on the digits, `<output>-digits.png`.

    `steps` are updates on the digits, for each rule. The same seed gives the same result.
    """
    paths, curves = (output.with_name(f"{output.name}-{task}.png") for task in ("paths", "digits"))
    console = Console()
    training, test = digits.load()
    with optserve.Client(":memory:") as client:
        descents = [descend(client, tuning.for_plane(rule)) for rule in optim.catalogue()]
        lessons = [
            teach(client, tuning.for_digits(rule), training, test, steps=steps, seed=seed)
            for rule in track(optim.catalogue(), "training with every rule", console=console)
        ]
    plots.draw_descents(descents, paths)
    plots.draw_lessons(lessons, curves)
    console.print(f"see {paths} and {curves}")
    return [paths, curves]
