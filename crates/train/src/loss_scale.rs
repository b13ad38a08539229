//! Dynamic loss scaling for f16 (Micikevicius et al. 2018): gradients below f16's smallest number
//! would vanish on their way back, so the loss is multiplied before the backward pass and the
//! gradients are divided after it.

use serde::{Deserialize, Serialize};

/// Where it starts, PyTorch's value.
const FIRST: f64 = 65_536.0;
/// Steps without an overflow after which it is doubled, PyTorch's value.
const GROWTH_INTERVAL: u64 = 2000;
/// Gradients that overflow even here do not overflow because of the scale.
const SMALLEST: f64 = 1.0 / 16_384.0;
/// A power of two that f32 holds with room for the loss.
const LARGEST: f64 = 16_777_216.0;

/// The factor of the loss, always a power of two: dividing by it is exact.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    factor: f64,
    /// Steps since it was last changed.
    steps: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        LossScale {
            factor: FIRST,
            steps: 0,
        }
    }
}

impl LossScale {
    /// What the loss is multiplied by.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// Takes note of a step whose gradients were finite.
    pub fn succeeded(&mut self) {
        self.steps += 1;
        if self.steps >= GROWTH_INTERVAL {
            self.steps = 0;
            self.factor = (self.factor * 2.0).min(LARGEST);
        }
    }

    /// Takes note of a step that was left out because a gradient overflowed. Whether there is a
    /// smaller factor to go on with.
    pub fn overflowed(&mut self) -> bool {
        self.steps = 0;
        self.factor /= 2.0;
        self.factor >= SMALLEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_at_an_overflow_and_doubles_after_a_while() {
        let mut scale = LossScale::default();
        assert!(scale.overflowed());
        assert_eq!(scale.factor(), 32_768.0);
        for _ in 0..GROWTH_INTERVAL - 1 {
            scale.succeeded();
        }
        assert_eq!(scale.factor(), 32_768.0);
        scale.succeeded();
        assert_eq!(scale.factor(), 65_536.0);
        // An overflow starts the count anew.
        scale.succeeded();
        assert!(scale.overflowed());
        for _ in 0..GROWTH_INTERVAL - 1 {
            scale.succeeded();
        }
        assert_eq!(scale.factor(), 32_768.0);
    }

    #[test]
    fn it_has_bounds() {
        let mut scale = LossScale::default();
        for _ in 0..100 * GROWTH_INTERVAL {
            scale.succeeded();
        }
        assert_eq!(scale.factor(), LARGEST);
        let halvings = (0..100).take_while(|_| scale.overflowed()).count();
        assert_eq!(halvings, 38);
    }
}
