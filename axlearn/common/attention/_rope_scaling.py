"""Rotary position embeddings whose frequencies are changed for longer sequences than a model was trained on."""

import math

import numpy as np

from axlearn.common.attention._position import RoFormerSinusoidalPositionalEmbedding
from axlearn.common.base_layer import BaseLayer
from axlearn.common.config import REQUIRED, Required, config_class, error_message


class LinearScaledSinusoidalPositionalEmbedding(RoFormerSinusoidalPositionalEmbedding):
    """Rotates as if every position were divided by a factor.

    Reference: Chen et al., Extending Context Window of Large Language Models via Positional Interpolation,
        https://arxiv.org/abs/2306.15595, equation 4.
    """

    @config_class
    class Config(RoFormerSinusoidalPositionalEmbedding.Config):
        """Configures `LinearScaledSinusoidalPositionalEmbedding`."""

        # What positions are divided by: the new length over the length in training. Positive.
        scaling_factor: Required[float] = REQUIRED

    def _frequencies(self) -> np.ndarray:
        _check_positive(self, "scaling_factor")
        return super()._frequencies() / self.config.scaling_factor


class Llama3SinusoidalPositionalEmbedding(RoFormerSinusoidalPositionalEmbedding):
    """Divides low frequencies by a factor, keeps high ones, and goes from one to the other in between.

    With `turns = original_max_seq_length * frequency / (2 pi)`, the turns of a pair over the length in
    training: frequencies with more than `high_freq_factor` turns stay, those with fewer than
    `low_freq_factor` are divided by `scaling_factor`. Between, `s = (turns - low_freq_factor) /
    (high_freq_factor - low_freq_factor)` weighs the two: `s f + (1 - s) f / scaling_factor`.

    Reference: Grattafiori et al., The Llama 3 Herd of Models, https://arxiv.org/abs/2407.21783, and the
        `rope_scaling` of the published configs of Llama 3.1, which states the numbers.
    """

    @config_class
    class Config(RoFormerSinusoidalPositionalEmbedding.Config):
        """Configures `Llama3SinusoidalPositionalEmbedding`."""

        # Tokens in a sequence in the training before the extension.
        original_max_seq_length: int = 8192
        # What low frequencies are divided by. Positive.
        scaling_factor: float = 8.0
        # Turns over the original length: at most so many are low, at least so many are high.
        low_freq_factor: float = 1.0
        high_freq_factor: float = 4.0

    def _frequencies(self) -> np.ndarray:
        cfg: Llama3SinusoidalPositionalEmbedding.Config = self.config
        _check_positive(self, "original_max_seq_length", "scaling_factor")
        if not cfg.low_freq_factor < cfg.high_freq_factor:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"low_freq_factor={cfg.low_freq_factor}, high_freq_factor={cfg.high_freq_factor}",
                    expected="low_freq_factor < high_freq_factor",
                )
            )
        frequencies = super()._frequencies()
        turns = cfg.original_max_seq_length * frequencies / (2 * math.pi)
        kept = (turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)
        return _interpolate(frequencies, cfg.scaling_factor, kept=kept)


class YaRNSinusoidalPositionalEmbedding(RoFormerSinusoidalPositionalEmbedding):
    """Divides low frequencies by a factor, keeps high ones, and sharpens attention a little.

    The pair that turns n times over the length in training is pair number `d(n) = dim
    ln(original_max_seq_length / (2 pi n)) / (2 ln theta)`, a real number. Pairs up to `floor(d(beta_fast))`
    keep their frequency, those from `ceil(d(beta_slow))` on have it divided by `scaling_factor`, and in
    between the share grows linearly. Sines and cosines are multiplied by `attn_factor * (0.1 ln
    scaling_factor + 1)`, hence logits by its square.

    Reference: Peng et al., YaRN, https://arxiv.org/abs/2309.00071, definitions 2 and 3, equation 22.
    """

    @config_class
    class Config(RoFormerSinusoidalPositionalEmbedding.Config):
        """Configures `YaRNSinusoidalPositionalEmbedding`."""

        # Tokens in a sequence in the training before the extension.
        original_max_seq_length: Required[int] = REQUIRED
        # The new length over the original one. Positive; up to 1 sines and cosines are not multiplied.
        scaling_factor: float = 1.0
        # Turns over the original length: about so few are divided by the factor, about so many stay.
        beta_slow: float = 1.0
        beta_fast: float = 32.0
        # How much of the frequencies that would stay does stay, in [0, 1]; 0 divides all.
        extrapolation_factor: float = 1.0
        # Further factor of sines and cosines.
        attn_factor: float = 1.0

    def _frequencies(self) -> np.ndarray:
        cfg: YaRNSinusoidalPositionalEmbedding.Config = self.config
        _check_positive(self, "original_max_seq_length", "scaling_factor", "beta_slow", "beta_fast")
        if cfg.beta_slow > cfg.beta_fast:
            raise ValueError(
                error_message(
                    where=self.path(),
                    what=f"beta_slow={cfg.beta_slow}, beta_fast={cfg.beta_fast}",
                    expected="beta_slow <= beta_fast",
                )
            )
        first, last = math.floor(self._pair_of(cfg.beta_fast)), math.ceil(self._pair_of(cfg.beta_slow))
        first, last = max(first, 0), min(last, cfg.dim - 1)
        # 0.001: where both ends are one pair, any number below 1 puts the whole step behind it.
        ramp = (np.arange(cfg.dim // 2) - first) / (last - first if last != first else 0.001)
        kept = (1 - np.clip(ramp, 0, 1)) * cfg.extrapolation_factor
        return _interpolate(super()._frequencies(), cfg.scaling_factor, kept=kept)

    def _pair_of(self, num_turns: float) -> float:
        """The index of the pair that turns so often over the original length, as a real number."""
        cfg: YaRNSinusoidalPositionalEmbedding.Config = self.config
        wavelength = cfg.original_max_seq_length / num_turns
        return cfg.dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(cfg.theta))

    def _amplitude(self) -> float:
        cfg: YaRNSinusoidalPositionalEmbedding.Config = self.config
        # 0.1: fitted to perplexities in equation 22 of the paper.
        temperature = 0.1 * math.log(cfg.scaling_factor) + 1 if cfg.scaling_factor > 1 else 1.0
        return temperature * cfg.attn_factor


def _interpolate(frequencies: np.ndarray, factor: float, *, kept: np.ndarray) -> np.ndarray:
    """Divides frequencies by the factor, except for the share `kept` of each, which is cut to [0, 1]."""
    kept = np.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _check_positive(layer: BaseLayer, *fields: str) -> None:
    for name in fields:
        value = getattr(layer.config, name)
        if not value > 0:
            raise ValueError(
                error_message(where=layer.path(), what=f"{name}={value}", expected="a number greater than 0")
            )
