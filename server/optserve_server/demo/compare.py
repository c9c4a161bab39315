"""Every rule of the catalogue at the same two tasks, and every wire format, with an engine inside this process."""

from pathlib import Path

from rich.console import Console
from rich.progress import track

import optserve
from optserve import formats
from optserve_server.demo import digits, plots, tuning
from optserve_server.demo.lesson import WORKERS, Traffic, teach
from optserve_server.demo.plane import descend

TRAFFIC = {
    "float32": Traffic(),
    "bfloat16": Traffic(formats.BFloat16(), formats.BFloat16()),
    "float16": Traffic(formats.Float16(), formats.Float16()),
    "int8 up, bfloat16 down": Traffic(formats.Int8(), formats.BFloat16()),
    "1 in 20 up, bfloat16 down": Traffic(formats.TopK(0.05), formats.BFloat16()),
    "1 in 100 up, bfloat16 down": Traffic(formats.TopK(0.01), formats.BFloat16()),
}


def compare(*, steps: int = 1000, seed: int = 0, output: Path = Path("optserve-compare")) -> list[Path]:
    """Draw every rule's way down a valley, `<output>-paths.png`, and its loss on the digits, `<output>-digits.png`.

    And Adam's with each wire format, `<output>-formats.png`. `steps` are updates on the digits, each time. The same seed
    gives the same result.
    """
    paths, curves, bits = (output.with_name(f"{output.name}-{task}.png") for task in ("paths", "digits", "formats"))
    console = Console()
    training, test = digits.load()
    with optserve.Client(":memory:") as client:
        descents = [descend(client, tuning.for_plane(rule)) for rule in tuning.LEARNING_RATES]
        lessons = [
            teach(client, tuning.for_digits(rule), training, test, steps=steps, seed=seed)
            for rule in track(tuning.LEARNING_RATES, "training with every rule", console=console)
        ]
        adam = tuning.for_digits("Adam")
        savings = [
            teach(client, adam, training, test, steps=steps, seed=seed, traffic=traffic)
            for traffic in track(TRAFFIC.values(), "training with every wire format", console=console)
        ]
    plots.draw_descents(descents, paths)
    rules = [(lesson.rule.rule, f"learning rate {lesson.rule.lr:g}", lesson) for lesson in lessons]
    plots.draw_lessons(f"{WORKERS} workers learn to read digits", rules, curves)
    named = [
        (name, "{:.3g} bits up, {:.3g} down".format(*traffic.bits), lesson)
        for (name, traffic), lesson in zip(TRAFFIC.items(), savings, strict=True)
    ]
    plots.draw_lessons(
        f"{WORKERS} workers learn to read digits with Adam: bits for each element, and what they cost", named, bits
    )
    console.print(f"see {paths}, {curves} and {bits}")
    return [paths, curves, bits]
