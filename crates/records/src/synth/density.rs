//! Distributions of sums, on a lattice: what is integrated out is integrated, not sampled.

/// Width of a cell of the lattice, in log-odds; the terms of a model are between 0.2 and 1.2 wide.
pub(super) const STEP: f64 = 1.0 / 64.0;

/// A distribution with masses at multiples of [`STEP`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Density {
    /// Of the first mass, in steps.
    first: i64,
    mass: Vec<f64>,
}

impl Density {
    /// Always 0: the neutral element of [`Density::plus`].
    pub(super) fn zero() -> Density {
        Density {
            first: 0,
            mass: vec![1.0],
        }
    }

    /// `weight` or `-weight`, equally likely. A value between two cells is shared among them so
    /// that its mean is kept.
    pub(super) fn sign(weight: f64) -> Density {
        let position = weight.abs() / STEP;
        let below = position.floor();
        let (inner, outer) = (below as i64, below as i64 + 1);
        let share = position - below;
        let mut mass = vec![0.0; (2 * outer + 1) as usize];
        for (cell, part) in [(inner, 1.0 - share), (outer, share)] {
            for cell in [cell, -cell] {
                mass[(cell + outer) as usize] += part / 2.0;
            }
        }
        Density {
            first: -outer,
            mass,
        }
    }

    /// `weight` with probability `chance`, else 0. A value between two cells is shared among them
    /// so that its mean is kept.
    pub(super) fn sometimes(weight: f64, chance: f64) -> Density {
        let position = weight / STEP;
        let below = position.floor();
        let share = position - below;
        let first = (below as i64).min(0);
        let last = (below as i64 + 1).max(0);
        let mut mass = vec![0.0; (last - first + 1) as usize];
        for (cell, part) in [
            (0, 1.0 - chance),
            (below as i64, chance * (1.0 - share)),
            (below as i64 + 1, chance * share),
        ] {
            mass[(cell - first) as usize] += part;
        }
        Density { first, mass }
    }

    /// Uniform on `[-half_width, half_width]`: each cell gets what lies within it.
    pub(super) fn uniform(half_width: f64) -> Density {
        let half = half_width.abs() / STEP;
        if half < 1e-9 {
            return Density::zero();
        }
        let last = (half + 0.5).floor() as i64;
        let mass = (-last..=last)
            .map(|cell| {
                let cell = cell as f64;
                let overlap = (cell + 0.5).min(half) - (cell - 0.5).max(-half);
                overlap.max(0.0) / (2.0 * half)
            })
            .collect();
        Density { first: -last, mass }
    }

    /// The distribution of the sum of two independent values.
    pub(super) fn plus(&self, other: &Density) -> Density {
        let mut mass = vec![0.0; self.mass.len() + other.mass.len() - 1];
        for (position, &a) in self.mass.iter().enumerate() {
            if a != 0.0 {
                for (sum, &b) in mass[position..].iter_mut().zip(&other.mass) {
                    *sum += a * b;
                }
            }
        }
        Density {
            first: self.first + other.first,
            mass,
        }
    }

    /// The mean of `function` over it.
    pub(super) fn mean_of(&self, function: impl Fn(f64) -> f64) -> f64 {
        self.cells()
            .filter(|(_, mass)| *mass > 0.0)
            .map(|(value, mass)| mass * function(value))
            .sum()
    }

    /// Values and their masses, in ascending order.
    pub(super) fn cells(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        self.mass
            .iter()
            .enumerate()
            .map(|(position, &mass)| ((self.first + position as i64) as f64 * STEP, mass))
    }

    /// For each cell of `self`, its mass and the mean of `function` over that cell's value plus a
    /// draw from `other`. `function` is called once for each cell of the sum.
    pub(super) fn means_of_sum(
        &self,
        other: &Density,
        function: impl Fn(f64) -> f64,
    ) -> Vec<(f64, f64)> {
        let table: Vec<f64> = (0..self.mass.len() + other.mass.len() - 1)
            .map(|position| function((self.first + other.first + position as i64) as f64 * STEP))
            .collect();
        self.mass
            .iter()
            .enumerate()
            .filter(|(_, mass)| **mass > 0.0)
            .map(|(position, &mass)| {
                let mean = other
                    .mass
                    .iter()
                    .zip(&table[position..])
                    .map(|(mass, value)| mass * value)
                    .sum();
                (mass, mean)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(density: &Density) -> [f64; 3] {
        [
            density.mean_of(|_| 1.0),
            density.mean_of(|value| value),
            density.mean_of(|value| value * value),
        ]
    }

    fn assert_near(found: [f64; 3], expected: [f64; 3], tolerance: f64) {
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found - expected).abs() < tolerance, "{found} {expected}");
        }
    }

    #[test]
    fn masses_means_and_variances_are_right() {
        assert_near(moments(&Density::sign(0.5)), [1.0, 0.0, 0.25], 1e-12);
        assert_near(moments(&Density::sign(0.7)), [1.0, 0.0, 0.49], STEP * STEP);
        assert_near(moments(&Density::sign(0.0)), [1.0, 0.0, 0.0], 1e-12);
        assert_near(
            moments(&Density::sometimes(0.5, 0.25)),
            [1.0, 0.125, 0.0625],
            1e-12,
        );
        let negative = Density::sometimes(-0.7, 0.5);
        assert_near(moments(&negative), [1.0, -0.35, 0.245], STEP * STEP);
        assert_near(
            moments(&Density::sometimes(0.0, 1.0)),
            [1.0, 0.0, 0.0],
            1e-12,
        );
        let half = 0.8 * 3f64.sqrt();
        assert_near(
            moments(&Density::uniform(half)),
            [1.0, 0.0, 0.64],
            STEP * STEP,
        );
        assert_near(moments(&Density::uniform(0.0)), [1.0, 0.0, 0.0], 1e-12);
        let sum = Density::uniform(half).plus(&Density::sign(-0.5));
        assert_near(moments(&sum), [1.0, 0.0, 0.89], STEP * STEP);
    }

    #[test]
    fn means_of_a_sum_agree_with_the_density_of_the_sum() {
        let (a, b) = (
            Density::uniform(1.1),
            Density::uniform(0.6).plus(&Density::sign(0.4)),
        );
        let function = |value: f64| (value + 0.3).tanh();
        let by_cell: f64 = a
            .means_of_sum(&b, function)
            .into_iter()
            .map(|(mass, mean)| mass * mean)
            .sum();
        assert!((by_cell - a.plus(&b).mean_of(function)).abs() < 1e-12);
    }
}
