"""A run of Lightning on the CPU that writes nothing and prints nothing."""

import lightning


def fit(module, data, path, epochs, ckpt_path=None, **kwargs):
    """Trains a module and returns the trainer."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer
