#!/usr/bin/env python3
"""Runs one plasticity command on a TPU slice of a GKE cluster, as a JobSet. --dry-run also prints the equivalent xpk command.

launch/tpu/gke.py [--dry-run] --name grid --topology v5e:4x4 --image REGION-docker.pkg.dev/PROJECT/REPO/plasticity:tpu [--spot] \\
    -- study --config configs/llama_1b_20tpp.py --workdir gs://bucket/work

Build and push the image first (launch/docker/Dockerfile.tpu). kubectl must point to the cluster, which needs the JobSet controller and a node pool of
the topology. Follow it with `kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME`; end it with `kubectl delete jobset NAME`. Needs only Python.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

# By generation: GKE node label, prefix of the accelerator type, and units per chip in its number (v4 and v5p count TensorCores).
TPUS = {
    "v4": ("tpu-v4-podslice", "v4", 2),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod", 1),
    "v5p": ("tpu-v5p-slice", "v5p", 2),
    "v6e": ("tpu-v6e-slice", "v6e", 1),
}
# For the machine types of multi-host slices.
CHIPS_PER_HOST = 4


class Refused(Exception):
    """Invalid input, described in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Refused(f"{message} (see gke.py --help)")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="gke.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--name", required=True, help="name of the JobSet: lower-case letters, digits and hyphens, at most 40 characters")
    parser.add_argument("--topology", required=True, help="such as v5e:4x4, v6e:4x8, v4:2x2x4 or v5p:4x4x4, as plasticity check takes it")
    parser.add_argument("--image", required=True, help="container image with plasticity, in a registry that the cluster can pull from")
    parser.add_argument("--spot", action="store_true", help="use spot nodes, which can be preempted at any time")
    parser.add_argument("--max-restarts", type=int, default=100, metavar="N", help="restarts after failures and preemptions (default 100)")
    parser.add_argument("--cluster", default="CLUSTER", help="used only in the printed xpk command")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest and the xpk command, and send nothing")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --: a plasticity command with its arguments")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", arguments.name):
        raise Refused(f"--name={arguments.name} must be lower-case letters, digits and hyphens, begin with a letter, and have at most 40 characters.")
    if arguments.max_restarts < 0:
        raise Refused(f"--max-restarts={arguments.max_restarts} must be 0 or more.")
    return arguments


def slice_of(topology: str) -> tuple[str, str, int]:
    """Returns (generation, shape, chips) of a topology such as v5e:4x4. Raises Refused if it is unknown."""
    generation, colon, shape = topology.partition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})+", shape) else []
    if generation not in TPUS or not colon or len(sizes) != (3 if generation in ("v4", "v5p") else 2):
        raise Refused(f"--topology={topology} is not a TPU slice; give two sizes for v5e and v6e (v5e:4x4), three for v4 and v5p (v5p:4x4x4).")
    chips = math.prod(sizes)
    if chips > CHIPS_PER_HOST and chips % CHIPS_PER_HOST:
        raise Refused(f"--topology={topology} has {chips} chips, but each host has {CHIPS_PER_HOST}; give a multiple of {CHIPS_PER_HOST}.")
    return generation, shape, chips


def manifest(arguments: argparse.Namespace) -> str:
    """Returns the JobSet as YAML."""
    generation, shape, chips = slice_of(arguments.topology)
    selector = {"cloud.google.com/gke-tpu-accelerator": TPUS[generation][0], "cloud.google.com/gke-tpu-topology": shape}
    if arguments.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    values = {
        "name": arguments.name,
        "max_restarts": arguments.max_restarts,
        "hosts": max(1, chips // CHIPS_PER_HOST),
        "chips_per_host": min(chips, CHIPS_PER_HOST),
        "node_selector": selector,
        "image": arguments.image,
        # Kubernetes expands $(NAME) in arguments; $$ stands for one dollar sign.
        "command": [word.replace("$", "$$") for word in arguments.command],
    }
    comment, _, body = Path(__file__).with_name("jobset.yaml").read_text(encoding="utf-8").partition("\n")
    return string.Template(body).substitute({name: json.dumps(value) for name, value in values.items()})


def xpk_command(arguments: argparse.Namespace) -> str:
    """Returns the equivalent command of xpk, Google's tool for such clusters."""
    generation, _, chips = slice_of(arguments.topology)
    _, prefix, per_chip = TPUS[generation]
    words = ["xpk", "workload", "create", f"--cluster={arguments.cluster}", f"--workload={arguments.name}", f"--tpu-type={prefix}-{chips * per_chip}"]
    words += ["--num-slices=1", f"--docker-image={arguments.image}", f"--max-restarts={arguments.max_restarts}"]
    return shlex.join([*words, *(["--spot"] if arguments.spot else []), f"--command={shlex.join(['plasticity', *arguments.command])}"])


def main(argv: list[str] | None = None) -> int:
    """Applies the JobSet, or prints it. Returns 2 if the input was refused, otherwise 0 or the status of kubectl."""
    try:
        arguments = _arguments(argv)
        text = manifest(arguments)
        if arguments.dry_run:
            print(f"# kubectl apply --filename=-\n# the same with xpk: {xpk_command(arguments)}\n{text}", end="")
            return 0
        if shutil.which("kubectl") is None:
            raise Refused("kubectl is not on the PATH; install it, and connect it to the cluster: gcloud container clusters get-credentials.")
        return subprocess.run(["kubectl", "apply", "--filename=-"], input=text, text=True).returncode
    except Refused as error:
        print(f"gke.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
