/// SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"):
/// a counter hashed by a bijection, so any stream can be entered from its seed alone.
pub(crate) struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// A stream for a pair of numbers, such as a seed and an epoch.
    pub(crate) fn of(seed: u64, stream: u64) -> Self {
        // The stream number goes through the mixer first: seeds and epochs are small consecutive
        // numbers, and sums of them would collide.
        let offset = SplitMix64 { state: stream }.next();
        SplitMix64 {
            state: seed ^ offset,
        }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform on `0..bound`, without bias: draws from the incomplete last block are rejected.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        debug_assert!(bound > 0);
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// Fisher–Yates.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_stream() {
        // The outputs usually quoted for seed 1234567.
        let mut random = SplitMix64 { state: 1_234_567 };
        let expected: [u64; 5] = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(std::array::from_fn(|_| random.next()), expected);
    }

    #[test]
    fn every_position_is_reached_about_equally_often() {
        let mut counts = [[0u32; 5]; 5];
        for seed in 0..20_000 {
            let mut items = [0, 1, 2, 3, 4];
            SplitMix64::of(seed, 7).shuffle(&mut items);
            for (position, item) in items.into_iter().enumerate() {
                counts[item][position] += 1;
            }
        }
        // 20,000 draws of probability 1/5: standard deviation 57.
        for row in counts {
            for count in row {
                assert!((3_700..4_300).contains(&count), "{count}");
            }
        }
    }
}
