//! A synthetic multimodal cohort with a known optimum.
//!
//! [`synthesize`] writes patients with register, notes, laboratory values, an image, a waveform,
//! omics and speech as real files in MEDS form. Whatever is drawn is a hash of seed and subject, so
//! that a patient is the same in a cohort of any size.
//!
//! # The generating model
//!
//! A patient has independent latent factors with mean 0 and variance 1: some are signs (−1 or 1,
//! equally likely), the others uniform on [−√3, √3]. Each shows in one modality, with so little
//! measurement noise that it can be read back nearly exactly (each file of this folder tests that):
//!
//! | modality | factors | how they show |
//! | --- | --- | --- |
//! | register | age; sex | birth and a static row; a static row |
//! | notes | breathlessness, swelling, course (signs) | a phrase each |
//! | labs | creatinine; C-reactive protein's trend | mean level; slope over six values |
//! | image | brightness; side (sign) | peak of a blob; left or right half |
//! | waveform | heart rate; amplitude | beats a minute; height of the R wave |
//! | omics | pathway; switch (sign) | mean of the genes of P03; of P07 |
//! | speech | pitch; pauses | fundamental frequency; share of silence |
//!
//! The log-odds of the outcome (within five years of the prediction) are a sum:
//!
//! ```text
//! logit = intercept + site_effect · score(site) + Σ weight · factor
//!         + interaction where side = switch = 1
//! ```
//!
//! over all factors but side and switch. What these two add, image and omics carry jointly: the
//! finding on the image counts only where the genes are switched on, so that either alone can be
//! read no further than to a chance of one half. The weights stand in `model.rs` and in the
//! `generating_model.json` of each cohort; the intercept follows from the prevalence. What is not made (`modalities`) has no
//! term.
//!
//! *Sites.* Each patient belongs to one of four equally likely sites with scores of mean 0 and
//! variance 1, which stands in the column `site` of every row. `site_effect` shifts the log-odds
//! and, by as many standard deviations, creatinine. *Missingness.* A modality is missing with its
//! share of `missing`, times `1 + missing_by_site · score / largest score`; given the site it is at
//! random. *Labels.* Of women's outcomes, `group_bias` are not recorded; then `label_noise` of all
//! labels are turned around. The label is what is recorded. The survival sidecar has an exponential
//! time that falls within five years exactly where the label is positive, and follow-up that ends
//! between five and ten years.
//!
//! # What is written
//!
//! `data/` in shards of 500 patients, `metadata/`, `labels/outcome/`, `survival/outcome/`,
//! `items/<modality>/<shard>/`, `metadata/pathways.gmt` (the genes' pathways), `truth/` (a row a
//! patient: factors, probabilities, the outcome before bias and noise; no part of MEDS, and nothing
//! to train on) and, last of all, `generating_model.json` with the model and its [`Optimum`]. Its
//! presence says that the cohort is complete.

mod density;
mod ensure;
mod images;
mod model;
mod omics;
mod optimum;
mod options;
mod random;
mod report;
mod rows;
mod speech;
#[cfg(test)]
mod testing;
mod text;
mod truth;
mod waveforms;
mod write;

pub use ensure::ensure_synthetic;
pub use optimum::{ModalityOptimum, Optimum, SourceOptimum, SubsetOptimum};
pub use options::{SynthModality, SynthOptions};
pub use report::{HeldOutModality, HeldOutOptimum, SynthReport};
pub use write::synthesize;
