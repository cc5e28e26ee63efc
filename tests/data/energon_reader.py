"""Run by test_export.py in an environment that holds Megatron-Energon: reads exported data sets with it.

    python energon_reader.py FOLDER train|val|test TRAINING

Prints one line of JSON for each sample: the sha256 of each member. TRAINING = 1: one epoch of the training
loader, which shuffles; 0: the loader for validation, in order.
"""

import hashlib
import json
import sys

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.energon.edataclass import edataclass


@edataclass
class Stored(Sample):
    """A sample as it lies in its tar."""

    members: dict[str, bytes]
    subflavors: dict[str, str]


@stateless
def as_it_is(sample: dict) -> Stored:
    members = {name: data for name, data in sample.items() if isinstance(data, bytes)}
    return Stored(**basic_sample_keys(sample), members=members, subflavors=sample["__subflavors__"])


class Bytes(DefaultTaskEncoder):
    """Leaves samples as the bytes that lie in the tars."""

    decoder = None
    cookers = (Cooker(as_it_is),)

    def encode_sample(self, sample):
        return sample

    def batch(self, samples):
        return samples


def main() -> None:
    folder, split, training = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
    options = {
        "split_part": split, "batch_size": 1, "task_encoder": Bytes(),
        "worker_config": WorkerConfig(rank=0, world_size=1, num_workers=0),
    }  # fmt: skip
    if training:
        options |= {"shuffle_buffer_size": 5, "max_samples_per_sequence": 3, "repeat": False}
    dataset = (get_train_dataset if training else get_val_dataset)(folder, **options)
    for (sample,) in get_loader(dataset):
        members = {name: hashlib.sha256(data).hexdigest() for name, data in sample.members.items()}
        print(json.dumps({"members": members, "subflavors": sample.subflavors}))


if __name__ == "__main__":
    main()
