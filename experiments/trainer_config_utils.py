"""Changes to a trainer's config for kinds of machines that recipes share."""

from absl import logging

from axlearn.common.config import ConfigModifier, InstantiableConfig, config_class
from axlearn.common.flash_attention.layer import FlashAttention, attention_configs


class V6eFlashConfigModifier(ConfigModifier):
    """Sets the block size of flash attention for TPU v6e.

    A v6e core holds tiles of keys and values twice as long as earlier ones do beside the accumulators, so each tile
    of queries is read for half as many steps.
    """

    @config_class
    class Config(ConfigModifier.Config):
        """Configures V6eFlashConfigModifier."""

        # Tokens in a tile of queries, keys and values; a multiple of 128, the width of a TPU's vector registers.
        tpu_block_size: int = 1024

    def __call__(self, cfg: InstantiableConfig) -> InstantiableConfig:
        """Sets `tpu_block_size` of each FlashAttention of a trainer's config, in place, and returns it.

        Recipes with and without flash attention share their mesh rules, and block sizes change no result. So a
        config without flash attention is none to refuse: it stays as it is, and a warning says so.
        """
        found = [layer for layer in attention_configs(cfg) if isinstance(layer, FlashAttention.Config)]
        for attention in found:
            attention.tpu_block_size = self.config.tpu_block_size
        if not found:
            name = type(self).__name__
            logging.warning("%s: there is no FlashAttention in this config: nothing to set.", name)
        return cfg
