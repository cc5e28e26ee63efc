"""Real photographs and what is in them. Every text was written for this project by looking at the picture.

Points are pixels of the original file, read off an enlarged grid (coins) or the centres of published boxes (cars).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_vlm.data.bundled.sources import SAHI, SCIKIT_IMAGE, SCIKIT_LEARN, Source


@dataclass(frozen=True)
class Photo:
    """One photograph with its captions, questions and places."""

    name: str
    source: Source
    path: str
    split: str
    caption: str
    """Several sentences: everything that a careful viewer would name."""
    short: str
    """One sentence."""
    questions: tuple[tuple[str, str], ...] = ()
    points: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Label -> x, y in pixels of the original. Only where the set is complete."""
    topic: str = ""
    """What composed scenes on it say they lie on: `gravel`. Empty = not used as a background."""
    scenery: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Part (left, top, right, bottom as fractions) that composed scenes may lie on."""


_IMAGE = "skimage/data/"
_LEARN = "sklearn/datasets/images/"
_SAHI = "demo/demo_data/"

PHOTOS = (
    Photo(
        "astronaut", SCIKIT_IMAGE, _IMAGE + "astronaut.png", "train",
        "A studio portrait of a smiling astronaut with short, wavy, light brown hair. She wears a bright orange "
        "flight suit with a dark metal collar ring open at the neck, a round blue and purple mission patch on the "
        "chest and a blue name tag with silver wings. A white helmet with a shiny black visor rests in front of her "
        "at the lower right. Behind her, the stars and stripes of the flag of the United States hang at the left "
        "edge, and a model of a space shuttle with its brown fuel tank and two white boosters stands at the right. "
        "The wall behind is mottled gray.",
        "A smiling astronaut in an orange suit poses between a flag and a model of a space shuttle.",
        (
            ("What color is the suit?", "Orange."),
            ("Where is the helmet?", "At the lower right, in front of the astronaut."),
            ("What stands behind her on the right?", "A model of a space shuttle."),
        ),
    ),
    Photo(
        "chelsea", SCIKIT_IMAGE, _IMAGE + "chelsea.png", "train",
        "A close view of the face of a tabby cat with short ginger and brown fur. Its two eyes are wide and "
        "yellow-green, with dark upright pupils, and look past the camera. The nose is brick red, and long white "
        "whiskers spread to both sides. Dark stripes run over the forehead and across the cheeks. The background is "
        "out of focus, in soft tones of beige and pink.",
        "A ginger tabby cat with yellow-green eyes, seen from very near.",
        (
            ("Which animal is this?", "A cat."),
            ("What color are its eyes?", "Yellow-green."),
            ("Is the background sharp?", "No, it is out of focus."),
        ),
        topic="a cat",
        scenery=(0.0, 0.0, 1.0, 1.0),
    ),
    Photo(
        "coffee", SCIKIT_IMAGE, _IMAGE + "coffee.png", "train",
        "A small espresso cup stands on a matching saucer on a wooden table, seen from above at an angle. The cup "
        "is reddish brown outside and white inside, and holds coffee with a light brown foam. A metal spoon lies on "
        "the saucer to the right of the cup's handle, its round bowl reflecting the light. The saucer is the same "
        "glossy reddish brown. The table has a strong orange grain, and the upper left corner of the picture is "
        "dark.",
        "A reddish-brown cup of espresso with a spoon on its saucer, on a wooden table.",
        (
            ("What is in the cup?", "Coffee."),
            ("What is the table made of?", "Wood."),
            ("What lies on the saucer?", "A metal spoon."),
        ),
        {"cups": ((290.0, 140.0),), "spoons": ((365.0, 285.0),)},
        topic="a cup of coffee",
        scenery=(0.65, 0.0, 1.0, 1.0),
    ),
    Photo(
        "rocket", SCIKIT_IMAGE, _IMAGE + "rocket.jpg", "train",
        "A tall white rocket stands upright on its launch pad at dusk. The sky goes from dark blue at the top to a "
        "paler blue over low clouds at the horizon. Four lattice towers stand around it: two thin ones close to the "
        "rocket, one on each side, and two large ones cut off by the left and right edges of the picture. Near the "
        "ground a row of lamps shines with star-shaped rays, yellow and white. The base of the rocket glows in warm "
        "light.",
        "A white rocket on its launch pad at dusk, with lattice towers and bright lamps.",
        (
            ("What stands in the middle?", "A rocket."),
            ("What time of day is it?", "Dusk."),
            ("How many lattice towers are there?", "Four."),
        ),
        {"rockets": ((321.0, 250.0),)},
        topic="the evening sky",
        scenery=(0.0, 0.0, 1.0, 0.7),
    ),
    Photo(
        "motorcycle", SCIKIT_IMAGE, _IMAGE + "motorcycle_left.png", "train",
        "A red motorcycle with a black seat stands on its stand in a garage, facing right. The word YAMAHA is "
        "written on the red tank, and the engine, the exhaust pipes and the fork are bright metal. It has cast "
        "wheels, orange indicators and one round headlight. The floor is bare concrete. Behind it are a worn wooden "
        "bench on the left, a gray door, and a metal shelf with cardboard boxes, cans, tools and a red plastic bin "
        "on the right. The walls show unpainted wooden boards.",
        "A red motorcycle parked on the concrete floor of a garage, in front of a bench and a full shelf.",
        (
            ("What color is the motorcycle?", "Red."),
            ("Which word is on the tank?", "YAMAHA."),
            ("What is behind the motorcycle on the right?", "A shelf with cardboard boxes."),
            ("Which way does the motorcycle face?", "To the right."),
        ),
        {"motorcycles": ((400.0, 265.0),), "wheels": ((197.0, 320.0), (598.0, 372.0))},
        topic="a concrete floor",
        scenery=(0.0, 0.75, 0.6, 1.0),
    ),
    Photo(
        "hubble", SCIKIT_IMAGE, _IMAGE + "hubble_deep_field.jpg", "train",
        "A black sky filled with hundreds of small, bright galaxies, taken by a space telescope. Most are tiny "
        "dots, and the larger ones show their shapes: round glows, thin streaks seen from the side, and small "
        "spirals. Their colors are white, blue, orange and red. A few stand out: orange ones right of the middle "
        "and at the upper left, a white one at the left edge. They are spread evenly, without any ground or "
        "horizon.",
        "Hundreds of small galaxies in many colors on a black sky.",
        (
            ("What do you see?", "Galaxies in the sky."),
            ("What color is the background?", "Black."),
        ),
        topic="galaxies",
    ),
    Photo(
        "retina", SCIKIT_IMAGE, _IMAGE + "retina.jpg", "train",
        "A medical photograph of the inside of an eye. The retina is a large, bright, orange-red disc on a black "
        "background, with a small notch in its outline at the upper right. A pale yellow spot at the left is the "
        "place where the optic nerve enters. Dark red blood vessels start from it and branch in long curves above "
        "and below. In the middle of the disc there is a darker, blurred red spot without vessels.",
        "The red retina of an eye with its blood vessels and a pale yellow optic disc at the left.",
        (
            ("What does this picture show?", "The retina of an eye."),
            ("Where is the bright yellow spot?", "At the left."),
        ),
        topic="a retina",
        scenery=(0.2, 0.2, 0.8, 0.8),
    ),
    Photo(
        "tissue", SCIKIT_IMAGE, _IMAGE + "ihc.png", "train",
        "A stained slice of tissue under a microscope. Large groups of cells are stained brown, each cell outlined "
        "in a darker brown; they lie at the top left, at the top right, along the left edge and as one oval island "
        "at the bottom, right of the middle. Between them runs pale, fibrous tissue with many small blue nuclei. "
        "There are two bright, empty gaps at the left edge and at the lower right, and a narrow white one inside "
        "the group at the top right.",
        "Brown stained groups of cells between pale tissue with blue nuclei, under a microscope.",
        (
            ("Which color are the large groups of cells?", "Brown."),
            ("What color are the small nuclei?", "Blue."),
        ),
    ),
    Photo(
        "camera", SCIKIT_IMAGE, _IMAGE + "camera.png", "train",
        "A black and white photograph of a man in a long dark coat and dark gloves, leaning forward and looking "
        "into a camera. The camera stands on a tripod in front of him, and both face right. His hair is short and "
        "dark. He stands on a large lawn. Far behind are low buildings with a dome, a white tower and a few more "
        "houses under a clear, light gray sky.",
        "A man in a dark coat looks through a camera on a tripod on a lawn, in black and white.",
        (
            ("What does the man look into?", "A camera."),
            ("What carries the camera?", "A tripod."),
            ("Is the photograph in color?", "No, it is black and white."),
        ),
        {"tripods": ((290.0, 400.0),)},
        topic="a lawn",
        scenery=(0.55, 0.48, 1.0, 1.0),
    ),
    Photo(
        "coins", SCIKIT_IMAGE, _IMAGE + "coins.png", "train",
        "A black and white photograph of twenty-four old coins on a dark gray cloth, laid out in four rows of six. "
        "The coins are worn, not quite round and of different sizes; the largest one is at the right end of the "
        "third row. Most show a head or a figure in relief. The ground is lighter behind the first row than behind "
        "the others.",
        "Twenty-four old coins in four rows of six on a dark cloth.",
        (
            ("How many rows of coins are there?", "Four."),
            ("How many coins are in each row?", "Six."),
            ("How many coins are there?", "Twenty-four."),
        ),
        {
            "coins": (
                (44.5, 54.0), (100.5, 56.0), (155.5, 51.0), (216.0, 51.0), (276.0, 53.0), (335.0, 44.0),
                (46.0, 125.0), (103.0, 126.0), (154.0, 127.0), (206.0, 124.0), (271.0, 120.0), (337.0, 125.0),
                (44.0, 197.0), (102.0, 196.0), (155.0, 198.0), (213.0, 193.0), (274.0, 194.0), (347.0, 187.0),
                (46.0, 260.0), (114.0, 266.0), (172.0, 262.0), (244.0, 264.0), (301.0, 264.0), (358.0, 268.0),
            )
        },
    ),
    Photo(
        "brick", SCIKIT_IMAGE, _IMAGE + "brick.png", "train",
        "A wall or pavement of long bricks, in shades of gray. The bricks stand upright in columns that are shifted "
        "against each other, with light gray joints between them. The columns lean slightly. The surface is fine "
        "and even; nothing else is in the picture.",
        "Gray bricks in upright, shifted columns with light joints.",
        (("What is this surface made of?", "Bricks."), ("What color are the joints?", "Light gray.")),
        topic="bricks",
    ),
    Photo(
        "grass", SCIKIT_IMAGE, _IMAGE + "grass.png", "validation",
        "A patch of grass from above, in black and white, filling the whole picture. Thin blades lie across each "
        "other in every direction, some light and some dark. Between them there are broader leaves of small weeds, "
        "several of them in the upper middle and near the right edge.",
        "Grass and a few small leaves from above, in black and white.",
        (("What covers the ground?", "Grass."),),
        topic="grass",
    ),
    Photo(
        "gravel", SCIKIT_IMAGE, _IMAGE + "gravel.png", "train",
        "Gravel from above, filling the whole picture. Hundreds of small, sharp-edged stones lie close together, in "
        "light and dark gray with nearly black shadows in the gaps. They are all of about the same size, and none "
        "stands out.",
        "Small gray stones of gravel, seen from above.",
        (("What fills the picture?", "Gravel."), ("What color are the stones?", "Gray.")),
        topic="gravel",
    ),
    Photo(
        "moon", SCIKIT_IMAGE, _IMAGE + "moon.png", "train",
        "The gray surface of the moon from above. It is mostly smooth, with many tiny craters. One larger, round "
        "crater, brighter on its right side, lies at the upper left. A bright streak with a small dark crater "
        "beside it stands right of the middle, near the top, and a group of dark spots lies at the bottom, near the "
        "middle.",
        "The surface of the moon with one larger crater at the upper left.",
        (
            ("Where is the larger crater?", "At the upper left."),
            ("What does this picture show?", "The surface of the moon."),
        ),
        topic="the moon",
    ),
    Photo(
        "page", SCIKIT_IMAGE, _IMAGE + "page.png", "test",
        "A photograph of a printed page, unevenly lit, darker at the left and at the bottom. The headline reads "
        "\"Region-based segmentation\". Below a thin line follows a paragraph: \"Let us first determine markers of "
        "the coins and the background. These markers are pixels that we can label unambiguously as either object or "
        "background. Here, the markers are found at the two extreme parts of the histogram of grey values:\". After "
        "a second line comes a line of code, \">>> markers = np.zeros_like(coins)\".",
        "A printed page with the headline \"Region-based segmentation\" and a line of code.",
        (("What is the headline?", "Region-based segmentation."),),
    ),
    Photo(
        "handwriting", SCIKIT_IMAGE, _IMAGE + "text.png", "train",
        "Handwritten mathematics in dark ink on ruled gray paper, photographed from near and at a slant. Parts of "
        "formulas with brackets, equals signs and letters are visible, cut off by the edges of the picture. The "
        "straight lines of the paper run from the upper left to the lower right.",
        "Slanted handwritten formulas in dark ink on ruled paper.",
        (("What is written on the paper?", "Mathematical formulas."),),
    ),
    Photo(
        "pagoda", SCIKIT_LEARN, _LEARN + "china.jpg", "train",
        "A tall Chinese tower with several roofs stands on the left, above trees. Its roofs are covered with orange "
        "tiles edged in green, and curve up at the corners; between them are red columns, railings and windows. A "
        "round golden knob crowns the top. Behind it a wide, pale lake stretches to the horizon, with small boats "
        "and a green island. Bushes and trees fill the lower edge, and one tree stands at the right. The sky is "
        "light blue with thin clouds.",
        "A red Chinese tower with orange and green roofs above a wide lake.",
        (
            ("What is behind the tower?", "A lake."),
            ("What color are the columns?", "Red."),
            ("On which side is the tower?", "On the left."),
        ),
        topic="a lake",
        scenery=(0.5, 0.0, 0.85, 0.75),
    ),
    Photo(
        "flower", SCIKIT_LEARN, _LEARN + "flower.jpg", "test",
        "A large, round dahlia in full bloom stands in the middle of the picture. Its many petals are arranged in "
        "rings, light orange outside and darker, reddish orange towards the tight center. The upper part of a "
        "second flower of the same color shows at the lower edge, right below it. The background is dark green and "
        "blue, with leaves far out of focus.",
        "A round orange dahlia before dark, blurred leaves.",
        (("What color is the flower?", "Orange."), ("What color is the background?", "Dark green.")),
        topic="dark leaves",
        scenery=(0.0, 0.0, 0.28, 1.0),
    ),
    Photo(
        "desert", SAHI, _SAHI + "terrain2.png", "train",
        "Five off-road cars drive one behind the other through a dry, bushy plain, towards the camera. The nearest, "
        "at the left, is white with yellow at its side; then come an orange one, a blue one with lamps on its roof, "
        "a brownish green one and, far at the right, another white one. Their headlights are on. Gray and green "
        "bushes cover the orange ground, and low red rocks stand at the right. Mountains line the horizon under "
        "heavy gray and white clouds.",
        "Five off-road cars in a row drive through a bushy desert below a cloudy sky.",
        (
            ("How many cars are there?", "Five."),
            ("Which color is the second car from the left?", "Orange."),
            ("What is in the sky?", "Clouds."),
        ),
        {"cars": ((329.0, 528.5), (561.5, 497.0), (674.5, 465.0), (760.0, 448.5), (811.0, 427.5))},
        topic="a desert",
        scenery=(0.0, 0.0, 1.0, 0.6),
    ),
    Photo(
        "motorway", SAHI, _SAHI + "small-vehicles1.jpeg", "validation",
        "A wide motorway runs straight towards the horizon between green hills, seen from above. Cars drive on both "
        "sides, among them a white van, and a low concrete wall with a purple cable on it separates the two "
        "directions. On the left the nearest car is blue; behind it is a silver one, and a red one near the edge of "
        "the road. At the left edge stands a blue sign with the white words \"Refuge areas for emergency use "
        "only\". Trees and meadows line the road, and the sky is full of pale clouds.",
        "A motorway with cars in both directions, between green hills under a cloudy sky.",
        (
            ("What color is the sign at the left?", "Blue."),
            ("What separates the two directions?", "A low concrete wall."),
        ),
        topic="a motorway",
        scenery=(0.3, 0.7, 0.9, 1.0),
    ),
)  # fmt: skip
