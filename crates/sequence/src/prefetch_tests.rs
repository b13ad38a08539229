use super::*;
use crate::labels::TaskLabels;
use crate::options::SequenceOptions;
use crate::plan::{BatchPlan, MicroBatch, Order, PlanOptions};
use crate::testing::{event, tokenizer, wordpiece, write_cohort};

fn prepared(count: i64) -> (tempfile::TempDir, Arc<Prepared>) {
    let patients: Vec<_> = (0..count)
        .map(|subject_id| calor_records::Patient {
            subject_id,
            events: vec![event(
                None,
                &"old ".repeat(1 + subject_id as usize % 5),
                None,
            )],
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let (cohort, labels) = write_cohort(folder.path(), &patients, 1, &[0]);
    let prepared = crate::prepare(
        &cohort,
        &TaskLabels::binary("task", &labels).unwrap(),
        &tokenizer(&wordpiece(), None),
        &SequenceOptions::default(),
        None,
        &folder.path().join("cache"),
        &|_| {},
    )
    .unwrap();
    (folder, Arc::new(prepared))
}

fn items() -> Arc<ItemStore> {
    Arc::new(ItemStore::none())
}

fn plan(prepared: &Prepared) -> BatchPlan {
    let options = PlanOptions {
        order: Order::Shuffled { seed: 0, epoch: 0 },
        global_batch: 8,
        micro_batch: 2,
        max_tokens: 32,
        packing: true,
    };
    BatchPlan::new(prepared, &prepared.all(), options).unwrap()
}

#[test]
fn batches_come_in_the_order_of_the_plan() {
    let (_folder, prepared) = prepared(50);
    let plan = plan(&prepared);
    let mut expected = Vec::new();
    for index in 2..plan.steps() {
        let step = plan.step(index);
        for (micro, micro_batch) in step.micro_batches.iter().enumerate() {
            expected.push(PrefetchedBatch {
                step: index,
                micro,
                micro_count: step.micro_batches.len(),
                step_supervised_count: step.samples().count(),
                batch: collate(&prepared, micro_batch, 0, 8),
            });
        }
    }
    assert!(expected.len() > plan.steps());
    // However many wait for the consumer, and however fast it is.
    for depth in [1, 3, 100] {
        let plan = plan.clone();
        let steps = (2..plan.steps()).map(move |index| plan.step(index));
        let prefetcher = Prefetcher::new(prepared.clone(), items(), steps, 0, 8, depth).unwrap();
        let found: Vec<_> = prefetcher.map(Result::unwrap).collect();
        assert_eq!(found, expected, "{depth} ahead");
    }
}

#[test]
fn no_more_than_the_depth_is_collated_ahead() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let (_folder, prepared) = prepared(50);
    let plan = plan(&prepared);
    let micro_batches = plan.step(0).micro_batches.len();
    let planned = Arc::new(AtomicUsize::new(0));
    let counted = planned.clone();
    let steps = (0..1_000_000).map(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        plan.step(0)
    });
    let mut prefetcher = Prefetcher::new(prepared, items(), steps, 0, 1, 2).unwrap();
    prefetcher.next().unwrap().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    // One taken, two waiting, one in the thread's hands.
    assert!(planned.load(Ordering::SeqCst) <= 1 + 4 / micro_batches);
    // And dropping it ends the thread, although a million steps are left.
    drop(prefetcher);
}

#[test]
#[should_panic = "index out of bounds"]
fn a_panic_of_the_thread_is_not_taken_for_the_end() {
    let (_folder, prepared) = prepared(4);
    let beyond = Step {
        index: 0,
        micro_batches: vec![MicroBatch {
            rows: vec![vec![999]],
        }],
    };
    let prefetcher = Prefetcher::new(prepared, items(), std::iter::once(beyond), 0, 1, 1).unwrap();
    assert_eq!(prefetcher.count(), 1);
}
