"""``egrsd train``: a training run from a YAML file."""

import argparse
import time
from pathlib import Path
from typing import Any

from egrsd_kernels.extras import how_to_install
from egrsd_kernels.presets import PRESETS

from .command import CommandError

DESCRIPTION = """Train with EGRSD or CL-EGRSD. The keys of the YAML file are the fields of EGRSDConfig (and so of TRL's
GRPOConfig and of TrainingArguments), of TRL's ModelConfig, and: dataset_name (of the Hub, a folder written by
save_to_disk, a .jsonl or .parquet file), dataset_config, dataset_train_split, dataset_test_split; reward_funcs, a list
of package.module.function, path/to/file.py:function or TRL's own (accuracy_reward); teacher_template, the messages that
follow the prompt in the teacher's conversation. The model goes to output_dir. On several GPUs:
accelerate launch -m egrsd_kernels train CONFIG.yaml"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model as a YAML file says",
        description=DESCRIPTION,
        usage="%(prog)s [-h] [--resume] CONFIG.yaml [--field value ...]",
        allow_abbrev=False,
    )
    add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    parser.set_defaults(run=run, overrides=[])


def add_config(parser: argparse.ArgumentParser) -> None:
    """The argument CONFIG, and the mention of what is not among the parser's own options: any of the run's."""
    parser.add_argument("config", metavar="CONFIG.yaml", help=f"a YAML file, or one of {', '.join(PRESETS)}")
    parser.epilog = "Any other option, --field value, takes the place of that key of CONFIG.yaml."


def run(args: argparse.Namespace) -> None:
    """Train and say where the model is. A :class:`CommandError` for a bad config, data set, reward or model."""
    config = read_config(find_config(args.config))
    try:
        from egrsd_kernels.models import ModelError
        from egrsd_kernels.trl.errors import CheckpointError, RewardError
        from egrsd_kernels.trl.run import find_checkpoint, make_trainer, train
        from egrsd_kernels.trl.settings import parse_settings
    except ImportError as error:
        raise CommandError(f"training needs TRL: {how_to_install('trl')} ({error})") from error
    try:
        settings = parse_settings(config, args.overrides)
        training = settings[1]
        checkpoint = find_checkpoint(training, args.resume)
        trainer = make_trainer(*settings)
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error
    try:
        train(trainer, checkpoint)
    # TRL's accuracy_reward asks for its packages when it is called.
    except (CheckpointError, ModelError, RewardError, ImportError) as error:
        raise CommandError(str(error)) from error
    if trainer.is_world_process_zero():
        print(f"{training.output_dir}: the model after step {trainer.state.global_step}")
    if trainer.accelerator.num_processes > 1:
        # gloo's threads need the interpreter to drop the last collective's tensors; at its end they would abort it.
        time.sleep(1)


def find_config(name: str) -> Path:
    """The file of a config that is given as a path or as a preset's name."""
    path = Path(name)
    if path.is_file():
        return path
    if name in PRESETS:
        return PRESETS[name]
    raise CommandError(f"{name}: no such file, nor a preset ({', '.join(PRESETS)})")


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    try:
        import yaml
    except ImportError as error:
        raise CommandError(f"YAML files need PyYAML: {how_to_install('trl')}") from error
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _loader(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise CommandError(f"{path}: expected keys and values, got {type(config).__name__}")
    return config


def _loader(path: Path) -> type:
    """yaml.SafeLoader, but for a key that is given twice: it would take the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor):  # before merges, which do repeat keys
            node = super().compose_mapping_node(anchor)
            lines = {}
            for key, _ in node.value:
                name, line = (key.tag, str(key.value)), key.start_mark.line + 1
                if name in lines:
                    raise CommandError(f"{path}: {key.value}: given twice, in lines {lines[name]} and {line}")
                lines[name] = line
            return node

    return Loader
