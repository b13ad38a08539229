//! Random numbers of new weights: a pure function of the seed and the tensor's name, drawn on the
//! host, so that every device starts from the same adapter.

/// A stream of numbers (SplitMix64, Steele et al. 2014).
#[derive(Debug, Clone)]
pub(crate) struct Stream(u64);

impl Stream {
    /// The stream that belongs to `name` under `seed`.
    pub fn new(seed: u64, name: &str) -> Stream {
        Stream(mix(seed, hash(name)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        finish(self.0)
    }

    /// Uniform in `[0, 1)`, 53 bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `count` values uniform in `[-bound, bound)`.
    pub fn uniform(&mut self, count: usize, bound: f64) -> Vec<f32> {
        (0..count)
            .map(|_| ((self.unit() * 2.0 - 1.0) * bound) as f32)
            .collect()
    }

    /// `count` normal values with mean 0 (Box and Muller 1958).
    pub fn normal(&mut self, count: usize, deviation: f64) -> Vec<f32> {
        let mut values = Vec::with_capacity(count + 1);
        while values.len() < count {
            let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt() * deviation;
            let (sin, cos) = (std::f64::consts::TAU * self.unit()).sin_cos();
            values.push((radius * cos) as f32);
            values.push((radius * sin) as f32);
        }
        values.truncate(count);
        values
    }
}

/// FNV-1a (Fowler, Noll and Vo 1991) of a name.
pub(crate) fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Two numbers into one that depends on every bit of both.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    finish(a.wrapping_add(finish(b.wrapping_add(0x9e37_79b9_7f4a_7c15))))
}

fn finish(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_distribution() {
        let count = 100_000;
        let moments = |values: &[f32]| {
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count as f64;
            let square = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / count as f64;
            (mean, square - mean * mean)
        };
        // Five standard errors of the mean and variance at this count.
        let (mean, variance) = moments(&Stream::new(1, "a").normal(count, 2.0));
        assert!(mean.abs() < 0.032 && (variance - 4.0).abs() < 0.09);
        let (mean, variance) = moments(&Stream::new(1, "a").uniform(count, 3.0));
        assert!(mean.abs() < 0.028 && (variance - 3.0).abs() < 0.045);
    }

    #[test]
    fn streams_depend_on_seed_and_name() {
        let draw = |seed, name| Stream::new(seed, name).uniform(4, 1.0);
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
    }
}
