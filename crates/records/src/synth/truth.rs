//! What the generating model knows of each patient, beside the cohort: `truth/`.

use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{
    BooleanBuilder, Float32Builder, Float64Builder, Int64Builder, StringBuilder,
};
use arrow_array::{ArrayRef, BooleanArray};
use arrow_schema::{DataType, Field};

use crate::error::RecordsError;
use crate::writer::{ShardOptions, TableWriter};

use super::model::{Draw, FACTORS, Latent, Model, SITES};
use super::optimum::Oracle;
use super::options::{Modalities, SynthModality, SynthOptions};

/// Gathers the rows of one shard.
pub(super) struct TruthWriter {
    made: Modalities,
    subject_id: Int64Builder,
    site: StringBuilder,
    factors: Vec<Float32Builder>,
    observed: Vec<Modalities>,
    logit: Float64Builder,
    probability: Float64Builder,
    label_probability: Float64Builder,
    observed_label_probability: Float64Builder,
    outcome: BooleanBuilder,
}

impl TruthWriter {
    pub(super) fn new(options: &SynthOptions) -> TruthWriter {
        TruthWriter {
            made: Modalities::of(&options.modalities),
            subject_id: Int64Builder::new(),
            site: StringBuilder::new(),
            factors: FACTORS.iter().map(|_| Float32Builder::new()).collect(),
            observed: Vec::new(),
            logit: Float64Builder::new(),
            probability: Float64Builder::new(),
            label_probability: Float64Builder::new(),
            observed_label_probability: Float64Builder::new(),
            outcome: BooleanBuilder::new(),
        }
    }

    pub(super) fn add(&mut self, model: &Model, oracle: &Oracle<'_>, draw: &Draw) {
        self.subject_id.append_value(draw.subject_id);
        self.site.append_value(SITES[draw.site]);
        for (factor, value) in self.factors.iter_mut().zip(draw.values) {
            factor.append_value(value as f32);
        }
        self.observed.push(draw.observed);
        self.logit.append_value(draw.logit);
        self.probability.append_value(draw.probability);
        let label = model.recorded(draw.probability, draw.value(Latent::Sex));
        self.label_probability.append_value(label);
        self.observed_label_probability
            .append_value(oracle.probability(draw, draw.observed));
        self.outcome.append_value(draw.outcome);
    }

    /// Columns: `subject_id`, `site`, each factor by its name, `has_<modality>`, `logit` and
    /// `probability` of the outcome, `label_probability` given everything and
    /// `observed_label_probability` given what is not missing, `outcome` before bias and noise.
    pub(super) fn write(mut self, path: &Path) -> Result<(), RecordsError> {
        let mut fields = Vec::new();
        let mut columns: Vec<ArrayRef> = Vec::new();
        let mut push = |name: &str, data_type: DataType, column: ArrayRef| {
            fields.push(Field::new(name, data_type, false));
            columns.push(column);
        };
        push(
            "subject_id",
            DataType::Int64,
            Arc::new(self.subject_id.finish()),
        );
        push("site", DataType::Utf8, Arc::new(self.site.finish()));
        for (factor, values) in FACTORS.iter().zip(&mut self.factors) {
            push(factor.name, DataType::Float32, Arc::new(values.finish()));
        }
        for modality in SynthModality::ALL
            .into_iter()
            .filter(|&one| self.made.contains(one))
        {
            let has: Vec<bool> = self
                .observed
                .iter()
                .map(|set| set.contains(modality))
                .collect();
            push(
                &format!("has_{modality}"),
                DataType::Boolean,
                Arc::new(BooleanArray::from(has)),
            );
        }
        for (name, values) in [
            ("logit", &mut self.logit),
            ("probability", &mut self.probability),
            ("label_probability", &mut self.label_probability),
            (
                "observed_label_probability",
                &mut self.observed_label_probability,
            ),
        ] {
            push(name, DataType::Float64, Arc::new(values.finish()));
        }
        push(
            "outcome",
            DataType::Boolean,
            Arc::new(self.outcome.finish()),
        );
        let mut table = TableWriter::create(path, fields, ShardOptions::default().row_group_rows)?;
        table.write(columns)?;
        table.finish()
    }
}
