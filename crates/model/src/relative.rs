//! Relative positions of disentangled attention (He et al. 2021, 2023): a query of content attends to
//! keys of positions, and queries of positions to keys of content.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::attention::Projections;
use crate::config::RelativeConfig;
use crate::linear::Linear;
use crate::norm::Norm;
use crate::parameter::{Parameter, Visit};
use crate::run::Mode;

/// The table that all layers read: an embedding for each bucket of distances.
#[derive(Debug, Clone)]
pub(crate) struct RelativeTable {
    /// `[2 · span, hidden]`
    pub weight: Parameter<2>,
    pub norm: Option<Norm>,
    pub config: RelativeConfig,
    pub heads: usize,
}

/// The table's embeddings, and which of them every pair of a row's places has.
#[derive(Debug, Clone)]
pub(crate) struct Relative {
    /// `[1, 2 · span, hidden]`
    embeddings: Tensor<3>,
    /// `[batch, heads, seq, seq]`, of query and key and of key and query: every layer picks by them,
    /// and keeps them, so they are made once.
    buckets: [Tensor<4, Int>; 2],
}

impl Relative {
    /// Whether a gradient is to reach the table.
    pub fn is_tracked(&self) -> bool {
        self.embeddings.is_tracked()
    }
}

impl RelativeTable {
    /// For `batch` rows of `seq` tokens, in the type of the activations.
    ///
    /// Tokens of one segment are as far apart in a row as their positions are, and others do not
    /// see each other, so that one table of distances serves every segment.
    pub fn of(&self, batch: usize, seq: usize, dtype: DType) -> Relative {
        let weight = self.weight.matching(dtype);
        let weight = match &self.norm {
            Some(norm) => norm.forward(weight),
            None => weight,
        };
        let span = self.config.span() as i64;
        let device = self.weight.tensor.device().inner();
        let near = |distance| (bucket(&self.config, distance) + span).clamp(0, 2 * span - 1) as i32;
        let buckets = (0..seq as i64)
            .flat_map(|query| (0..seq as i64).map(move |key| near(query - key)))
            .collect::<Vec<i32>>();
        let buckets = TensorData::new(buckets, [1, 1, seq, seq]);
        let buckets = Tensor::<4, Int>::from_data(buckets, (&device, DType::I32));
        let all = |buckets: Tensor<4, Int>| buckets.repeat_dim(0, batch).repeat_dim(1, self.heads);
        Relative {
            embeddings: weight.unsqueeze::<3>(),
            buckets: [all(buckets.clone()), all(buckets.transpose())],
        }
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.weight);
        if let Some(norm) = &mut self.norm {
            norm.visit(visitor);
        }
    }
}

/// The bucket of a distance: the distance itself up to half of the buckets, beyond that logarithmic
/// up to the largest distance.
fn bucket(config: &RelativeConfig, distance: i64) -> i64 {
    let Some(buckets) = config.buckets else {
        return distance;
    };
    let middle = (buckets / 2) as i64;
    if distance.abs() <= middle {
        return distance;
    }
    // In f32 and in this order, like Transformers: what is rounded up depends on it.
    let ratio = distance.abs() as f32 / middle as f32;
    let largest = ((config.max_distance as f64 - 1.0) / middle as f64) as f32;
    let logarithm = (ratio.ln() / largest.ln() * (middle - 1) as f32).ceil() as i64 + middle;
    distance.signum() * logarithm
}

/// One layer's part: what of the positions it attends to, and with which layers.
#[derive(Debug, Clone)]
pub(crate) struct Disentangled {
    pub config: RelativeConfig,
    /// Where they are not the content's own.
    pub position_key: Option<Linear>,
    pub position_query: Option<Linear>,
}

impl Disentangled {
    /// What is added to the products of queries and keys, `[batch, heads, seq, seq]`; both are
    /// `[batch, seq, heads, head_dim]`.
    pub fn bias(
        &self,
        query: &Tensor<4>,
        key: &Tensor<4>,
        relative: &Relative,
        projections: &Projections,
        mode: Mode,
    ) -> Tensor<4> {
        let [_, _, heads, head_dim] = query.dims();
        let [by_query, by_key] = &relative.buckets;
        let [own_query, own_key, _] = match projections {
            Projections::Split(projections) => projections.as_ref(),
            Projections::Fused { .. } => unreachable!("DeBERTa's projections are split"),
        };
        // `[1, heads, head_dim, 2 · span]`
        let positions = |linear: &Linear| -> Tensor<4> {
            let projected = linear.forward(relative.embeddings.clone(), mode);
            let [_, rows, _] = projected.dims();
            let projected = projected.reshape([1, rows, heads, head_dim]);
            projected.swap_dims(1, 2).swap_dims(2, 3)
        };
        // Of each place's scores for all buckets, those of the distances to the other places.
        let pick = |states: &Tensor<4>, positions: Tensor<4>, buckets: &Tensor<4, Int>| {
            let scores = calor_kernels::matmul(states.clone().swap_dims(1, 2), positions);
            scores.gather(3, buckets.clone())
        };
        let mut bias = None;
        if self.config.content_to_position {
            let keys = positions(self.position_key.as_ref().unwrap_or(own_key));
            bias = Some(pick(query, keys, by_query));
        }
        if self.config.position_to_content {
            let queries = positions(self.position_query.as_ref().unwrap_or(own_query));
            // By key first: a row of scores belongs to one key.
            let of_keys = pick(key, queries, by_key).swap_dims(2, 3);
            bias = Some(match bias {
                Some(bias) => bias + of_keys,
                None => of_keys,
            });
        }
        bias.expect("at least one kind of attention to positions")
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        let linears = [&mut self.position_key, &mut self.position_query];
        for linear in linears.into_iter().flatten() {
            linear.visit(visitor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_fall_into_the_buckets_of_transformers() {
        let config = RelativeConfig {
            buckets: Some(8),
            max_distance: 32,
            content_to_position: true,
            position_to_content: true,
            shared: true,
            norm: true,
        };
        // transformers 5.17: make_log_bucket_position(tensor, 8, 32).
        let expected = [
            (0, 0),
            (1, 1),
            (-3, -3),
            (4, 4),
            (-4, -4),
            (5, 5),
            (8, 6),
            (9, 6),
            (-16, -7),
            (31, 7),
            (40, 8),
        ];
        for (distance, of) in expected {
            assert_eq!(bucket(&config, distance), of, "{distance}");
        }
        let plain = RelativeConfig {
            buckets: None,
            ..config
        };
        assert_eq!(bucket(&plain, -20), -20);
    }
}
