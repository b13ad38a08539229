//! Time, behind a trait so that a test can hold it.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A monotonic clock.
pub trait Clock: Send + Sync {
    /// Seconds since some fixed moment; never goes back.
    fn now_s(&self) -> f64;

    /// Blocks for `duration`.
    fn sleep(&self, duration: Duration);
}

/// The operating system's monotonic clock.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_s(&self) -> f64 {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_secs_f64()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// A clock that moves only when told to.
    #[derive(Debug, Default)]
    pub(crate) struct ManualClock(Mutex<f64>);

    impl ManualClock {
        pub(crate) fn advance(&self, seconds: f64) {
            *self.0.lock().unwrap() += seconds;
        }
    }

    impl Clock for ManualClock {
        fn now_s(&self) -> f64 {
            *self.0.lock().unwrap()
        }

        fn sleep(&self, duration: Duration) {
            self.advance(duration.as_secs_f64());
        }
    }

    #[test]
    fn the_system_clock_moves_forward_by_what_was_slept() {
        let before = SystemClock.now_s();
        SystemClock.sleep(Duration::from_millis(20));
        assert!(SystemClock.now_s() - before >= 0.02);
    }
}
