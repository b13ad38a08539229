use super::*;
use crate::clock::SystemClock;
use crate::clock::tests::ManualClock;

/// A source that draws constant watts by a manual clock, until it is told to fail.
pub(crate) struct ConstantSource {
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) component: Component,
    pub(crate) watts: Arc<Mutex<f64>>,
    pub(crate) broken: Arc<AtomicBool>,
    last_s: f64,
    total_j: f64,
}

impl ConstantSource {
    pub(crate) fn new(clock: &Arc<ManualClock>, component: Component, watts: f64) -> Self {
        ConstantSource {
            clock: clock.clone(),
            component,
            watts: Arc::new(Mutex::new(watts)),
            broken: Arc::new(AtomicBool::new(false)),
            last_s: clock.now_s(),
            total_j: 0.0,
        }
    }
}

impl EnergySource for ConstantSource {
    fn component(&self) -> Component {
        self.component
    }

    fn name(&self) -> &str {
        "constant"
    }

    fn energy_j(&mut self) -> Result<f64, MeterError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(MeterError::WentBackwards {
                source_name: "constant".to_owned(),
            });
        }
        let now_s = self.clock.now_s();
        self.total_j += (now_s - self.last_s) * *self.watts.lock().unwrap();
        self.last_s = now_s;
        Ok(self.total_j)
    }

    fn label(&self, energy_j: f64) -> Quantity {
        Quantity::measured(energy_j, "constant")
    }

    fn counts_idle(&self) -> bool {
        true
    }
}

fn gross_j(meter: &EnergyMeter, purpose: Purpose) -> Quantity {
    meter.components().0[0].gross_j[purpose.index()].clone()
}

#[test]
fn windows_of_different_purposes_are_kept_apart_and_leave_no_gap() {
    let clock = Arc::new(ManualClock::default());
    let source = ConstantSource::new(&clock, Component::Host, 10.0);
    let mut meter = EnergyMeter::new(vec![Channel::Source(Box::new(source))], clock.clone(), None);
    clock.advance(100.0); // nothing is open: counted nowhere
    meter.begin(Purpose::Training);
    clock.advance(3.0);
    assert_eq!(
        meter.last_j(),
        Quantity::unavailable("host: no window has ended")
    );
    meter.begin(Purpose::Evaluation);
    assert_eq!(meter.last_j().value(), Some(30.0));
    clock.advance(2.0);
    meter.begin(Purpose::Training);
    clock.advance(4.0);
    meter.end();
    meter.end();
    clock.advance(100.0);
    assert_eq!(meter.last_j().value(), Some(40.0));
    assert_eq!(gross_j(&meter, Purpose::Training).value(), Some(70.0));
    assert_eq!(gross_j(&meter, Purpose::Evaluation).value(), Some(20.0));
    assert_eq!(
        gross_j(&meter, Purpose::WarmUp),
        Quantity::unavailable("no warm_up was measured")
    );
    assert_eq!(meter.components().0[0].windows, [0, 2, 1]);
}

#[test]
fn the_idle_baseline_is_the_mean_watts_at_rest() {
    let clock = Arc::new(ManualClock::default());
    let source = ConstantSource::new(&clock, Component::Device, 60.0);
    let watts = source.watts.clone();
    let mut meter = EnergyMeter::new(vec![Channel::Source(Box::new(source))], clock.clone(), None);
    meter.measure_idle(Duration::from_secs(2));
    *watts.lock().unwrap() = 400.0;
    clock.advance(5.0);
    let (components, idle_window_s) = meter.components();
    assert_eq!(idle_window_s, Some(2.0));
    assert_eq!(components[0].idle_w.value(), Some(60.0));
    assert!(components[0].idle_w.source().contains("2.00 s at rest"));
}

#[test]
fn without_an_idle_window_there_is_no_baseline_and_no_zero() {
    let clock = Arc::new(ManualClock::default());
    let source = ConstantSource::new(&clock, Component::Host, 60.0);
    let mut meter = EnergyMeter::new(vec![Channel::Source(Box::new(source))], clock, None);
    meter.measure_idle(Duration::ZERO);
    let idle_w = meter.components().0[0].idle_w.clone();
    assert_eq!(
        idle_w,
        Quantity::unavailable("the idle baseline was not measured")
    );
}

#[test]
fn a_source_that_fails_in_a_window_makes_its_total_unavailable_for_good() {
    let clock = Arc::new(ManualClock::default());
    let source = ConstantSource::new(&clock, Component::Host, 10.0);
    let broken = source.broken.clone();
    let mut meter = EnergyMeter::new(vec![Channel::Source(Box::new(source))], clock.clone(), None);
    meter.begin(Purpose::Training);
    clock.advance(1.0);
    broken.store(true, Ordering::Relaxed);
    meter.begin(Purpose::Evaluation);
    broken.store(false, Ordering::Relaxed);
    clock.advance(1.0);
    meter.begin(Purpose::Training);
    clock.advance(1.0);
    meter.end();
    // The window itself was read.
    assert_eq!(meter.last_j().value(), Some(10.0));
    for purpose in [Purpose::Training, Purpose::Evaluation] {
        let energy = gross_j(&meter, purpose);
        assert!(energy.value().is_none(), "{energy:?}");
        assert!(energy.source().contains("went backwards"));
    }
}

#[test]
fn live_watts_follow_the_last_seconds() {
    let clock = Arc::new(ManualClock::default());
    let source = ConstantSource::new(&clock, Component::Host, 10.0);
    let watts = source.watts.clone();
    let meter = EnergyMeter::new(vec![Channel::Source(Box::new(source))], clock.clone(), None);
    assert!(
        meter.live_watts().value().is_none(),
        "one reading is not a power"
    );
    clock.advance(1.0);
    assert!((meter.live_watts().value().unwrap() - 10.0).abs() < 1e-9);
    *watts.lock().unwrap() = 90.0;
    for _ in 0..5 {
        clock.advance(1.0);
        meter.live_watts();
    }
    assert!((meter.live_watts().value().unwrap() - 90.0).abs() < 1e-9);
}

#[test]
fn a_missing_component_is_never_a_zero() {
    let clock = Arc::new(ManualClock::default());
    let missing = Channel::Missing {
        component: Component::Device,
        reason: "no driver".to_owned(),
    };
    let host = ConstantSource::new(&clock, Component::Host, 10.0);
    let mut meter = EnergyMeter::new(
        vec![Channel::Source(Box::new(host)), missing],
        clock.clone(),
        None,
    );
    meter.begin(Purpose::Training);
    clock.advance(1.0);
    meter.end();
    let (components, _) = meter.components();
    assert_eq!(components[0].gross_j[1].value(), Some(10.0));
    assert_eq!(components[1].gross_j[1], Quantity::unavailable("no driver"));
    assert_eq!(
        meter.live_watts(),
        Quantity::unavailable("device: no driver")
    );
}

/// Counts how often it is read.
struct CountingSource(Arc<Mutex<u64>>);

impl EnergySource for CountingSource {
    fn component(&self) -> Component {
        Component::Host
    }

    fn name(&self) -> &str {
        "counting"
    }

    fn energy_j(&mut self) -> Result<f64, MeterError> {
        let mut reads = self.0.lock().unwrap();
        *reads += 1;
        Ok(*reads as f64)
    }

    fn label(&self, energy_j: f64) -> Quantity {
        Quantity::measured(energy_j, "counting")
    }

    fn counts_idle(&self) -> bool {
        true
    }
}

#[test]
fn the_background_thread_reads_on_its_own_and_stops_with_the_meter() {
    let reads = Arc::new(Mutex::new(0));
    let source = CountingSource(reads.clone());
    let meter = EnergyMeter::new(
        vec![Channel::Source(Box::new(source))],
        Arc::new(SystemClock),
        Some(Duration::from_millis(5)),
    );
    let started = std::time::Instant::now();
    while *reads.lock().unwrap() < 5 {
        thread::sleep(Duration::from_millis(2));
        assert!(
            started.elapsed().as_secs() < 30,
            "the sampler does not read"
        );
    }
    drop(meter);
    let after = *reads.lock().unwrap();
    thread::sleep(Duration::from_millis(40));
    assert_eq!(*reads.lock().unwrap(), after);
}
