"""log.jsonl's numbers to TensorBoard or Weights & Biases, for those who ask.  Nothing here is ever required."""

import secrets

from nano_dmd.checkpoint import UserError, read_json, write_json

HOW = {"tensorboard": "pip install tensorboard", "wandb": "pip install wandb"}


def flatten(record, prefix=""):
    """{"grad": {"dmd_loss": 1.0}, "mesm": [1.0, None]} -> {"grad/dmd_loss": 1.0, "mesm/0": 1.0}: numbers only."""
    if isinstance(record, (int, float)):
        return {prefix: record}
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return {k: v for name, value in items for k, v in flatten(value, f"{prefix}/{name}".lstrip("/")).items()}


def tracker(cfg, out, step=0):
    """send(record) for --log_to; does nothing where it is empty.  raises UserError if the package is missing.

    A run resumed after `step` goes on in the same record, and what was sent after that step is sent again, not twice.
    """
    if not cfg.log_to:
        return lambda record: None
    try:
        if cfg.log_to == "wandb":
            import wandb

            run = wandb.init(project="nano_dmd", name=out.name, dir=str(out), config=vars(cfg), resume="allow",
                             id=run_id(out, step))
            return lambda record: run.log(flatten(record), step=record["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError(f"--log_to {cfg.log_to} needs a package ({e}): {HOW[cfg.log_to]}, or leave it out") from e
    writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def send(record):
        for name, value in flatten(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return send


def run_id(out, step):
    """The name W&B knows a run by, in wandb.json: a resumed run is the same one, a new run in this folder another."""
    path = out / "wandb.json"
    if not (step and path.is_file()):
        write_json(path, {"id": secrets.token_hex(8)})
    return read_json(path, {"id": str})["id"]
