use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use crate::SequenceError;
use crate::batch::{HostBatch, collate};
use crate::items::ItemStore;
use crate::plan::Step;
use crate::prepared::Prepared;

/// Collates micro-batches on a thread of its own and decodes their items, a bounded number ahead,
/// in the order of the steps it was given. Dropping it stops the thread.
pub struct Prefetcher {
    batches: Option<Receiver<Result<PrefetchedBatch, SequenceError>>>,
    thread: Option<JoinHandle<()>>,
}

/// A collated micro-batch and its place in the step.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefetchedBatch {
    /// [`Step::index`].
    pub step: usize,
    /// Number of the micro-batch within the step, and how many the step has.
    pub micro: usize,
    pub micro_count: usize,
    /// Labels that contribute to the loss of the whole step: what its sum is divided by.
    pub step_supervised_count: usize,
    pub batch: HostBatch,
}

impl Prefetcher {
    /// Starts collating. `depth` micro-batches (at least one) wait at most. `pad_id` and
    /// `seq_multiple` are those of [`collate`].
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn new(
        prepared: Arc<Prepared>,
        items: Arc<ItemStore>,
        steps: impl Iterator<Item = Step> + Send + 'static,
        pad_id: u32,
        seq_multiple: usize,
        depth: usize,
    ) -> std::io::Result<Prefetcher> {
        let (sender, batches) = sync_channel(depth.max(1));
        let thread = std::thread::Builder::new()
            .name("prefetch".to_string())
            .spawn(move || {
                for step in steps {
                    let step_supervised_count = step.supervised_count(&prepared);
                    for (micro, micro_batch) in step.micro_batches.iter().enumerate() {
                        let mut batch = collate(&prepared, micro_batch, pad_id, seq_multiple);
                        let batch = items.fill(&mut batch).map(|()| PrefetchedBatch {
                            step: step.index,
                            micro,
                            micro_count: step.micro_batches.len(),
                            step_supervised_count,
                            batch,
                        });
                        let failed = batch.is_err();
                        // Nobody listens any more: the consumer has been dropped.
                        if sender.send(batch).is_err() || failed {
                            return;
                        }
                    }
                }
            })?;
        Ok(Prefetcher {
            batches: Some(batches),
            thread: Some(thread),
        })
    }
}

impl Iterator for Prefetcher {
    type Item = Result<PrefetchedBatch, SequenceError>;

    /// # Panics
    /// When the thread has panicked, with its message.
    fn next(&mut self) -> Option<Self::Item> {
        if let Ok(batch) = self.batches.as_ref()?.recv() {
            return Some(batch);
        }
        self.batches = None;
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
        {
            std::panic::resume_unwind(panic);
        }
        None
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        // The thread notices that nobody listens at its next batch.
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic here would come on top of the reason for dropping; it was printed already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
#[path = "prefetch_tests.rs"]
mod tests;
