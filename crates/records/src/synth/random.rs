//! Draws without generator state: each is a hash of the seed, the subject, what it is for and its
//! position, so that a patient is the same in a cohort of any size, written by any thread.

/// What a stream of draws is for. Streams of one patient are independent, so that an image stays
/// the same whichever other modalities are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Latent = 1,
    Missing,
    Outcome,
    Split,
    Times,
    Notes,
    Labs,
    Image,
    Waveform,
    Omics,
    Speech,
}

/// The stream of one patient for one purpose (SplitMix64; Steele, Lea, Flood 2014, "Fast
/// splittable pseudorandom number generators": a counter hashed by a bijection).
#[derive(Clone, Debug)]
pub(super) struct Draws(u64);

impl Draws {
    pub(super) fn of(seed: u64, subject_id: i64, stream: Stream) -> Draws {
        // Seeds, subjects and streams are small consecutive numbers: each is mixed before the next
        // one is added, or sums of them would collide.
        let subject = mixed(mixed(seed).wrapping_add(subject_id as u64));
        Draws(mixed(subject.wrapping_add(stream as u64)))
    }

    pub(super) fn next(&mut self) -> u64 {
        let draw = mixed(self.0);
        self.0 = self.0.wrapping_add(INCREMENT);
        draw
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `[low, high)`.
    pub(super) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// −1 or 1, equally likely.
    pub(super) fn sign(&mut self) -> f64 {
        if self.next() >> 63 == 0 { -1.0 } else { 1.0 }
    }

    /// Uniform on `0..bound`; the bias of the last values is below `bound` / 2⁶⁴.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// Nearly normal with mean 0 and variance 1, never beyond ±4.9: the sum of a draw's eight
    /// bytes. Measurement noise needs no better tails, and this takes a nanosecond.
    pub(super) fn noise(&mut self) -> f64 {
        const MEAN: f64 = 8.0 * 127.5;
        // √(8 · (256² − 1) / 12)
        const DEVIATION: f64 = 209.021_529_672_8;
        let bytes = self.next().to_le_bytes();
        let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
        (f64::from(sum) - MEAN) / DEVIATION
    }
}

const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;

fn mixed(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(INCREMENT);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_published_one() {
        // The outputs usually quoted for seed 1234567.
        let mut draws = Draws(1_234_567);
        let expected: [u64; 3] = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ];
        assert_eq!(std::array::from_fn(|_| draws.next()), expected);
    }

    #[test]
    fn noise_has_mean_zero_and_variance_one() {
        let mut draws = Draws::of(3, 5, Stream::Labs);
        let noise: Vec<f64> = (0..100_000).map(|_| draws.noise()).collect();
        let mean = noise.iter().sum::<f64>() / 1e5;
        let variance = noise.iter().map(|value| value * value).sum::<f64>() / 1e5;
        // Standard errors 0.003 and 0.0045.
        assert!(mean.abs() < 0.015, "{mean}");
        assert!((variance - 1.0).abs() < 0.02, "{variance}");
    }

    #[test]
    fn neighbouring_seeds_subjects_and_streams_have_nothing_in_common() {
        let mut seen = std::collections::HashSet::new();
        for seed in 0..20 {
            for subject_id in 0..20 {
                for stream in [Stream::Latent, Stream::Missing, Stream::Speech] {
                    let mut draws = Draws::of(seed, subject_id, stream);
                    for _ in 0..5 {
                        assert!(seen.insert(draws.next()));
                    }
                }
            }
        }
    }
}
