//! Singular values and vectors on the host, in f64: the largest of a weight matrix, and all of a
//! product of two thin ones. The result depends on nothing but the numbers that go in: no thread
//! count, no instruction set.

use crate::random::Stream;

/// Rounds after which the largest singular vectors are taken as they are.
const MOST_ROUNDS: usize = 300;
/// Residual of a converged singular vector, as a share of the largest singular value: what is left
/// is below the rounding of f32.
const CONVERGED: f64 = 1e-7;
/// Sweeps of rotations after which columns count as orthogonal.
const MOST_SWEEPS: usize = 60;

/// Vectors of one length, one behind the other.
#[derive(Debug, Clone)]
pub(crate) struct Vectors {
    length: usize,
    values: Vec<f64>,
}

/// `Σ values[k] · left[k] right[k]ᵀ`, the largest value first.
#[derive(Debug, Clone)]
pub(crate) struct Singular {
    pub left: Vectors,
    pub values: Vec<f64>,
    pub right: Vectors,
}

/// How long the largest singular vectors are sought.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Effort {
    /// Until they have converged, among more than are wanted.
    Converged,
    /// So many rounds, among no more than are wanted: PyTorch's `svd_lowrank` with `q` = `count`.
    Rounds(usize),
}

/// The `count` largest singular values of `matrix` `[rows, columns]`, by subspace iteration from a
/// random start (Halko, Martinsson and Tropp 2011), the subspace's own singular vectors by rotations.
///
/// Where values near the last wanted one are all but equal, they are found after [`MOST_ROUNDS`] no
/// better than they differ.
pub(crate) fn largest(
    matrix: &[f32],
    [rows, columns]: [usize; 2],
    count: usize,
    effort: Effort,
    mut start: Stream,
) -> Singular {
    assert_eq!(matrix.len(), rows * columns);
    let most = rows.min(columns);
    let count = count.min(most);
    let (width, rounds) = match effort {
        Effort::Converged => ((2 * count + 16).min(most), MOST_ROUNDS),
        Effort::Rounds(rounds) => (count, rounds.max(1)),
    };
    let drawn = start.normal(width * columns, 1.0);
    let mut right = Vectors {
        length: columns,
        values: drawn.into_iter().map(f64::from).collect(),
    };
    let mut found: Option<Singular> = None;
    for _ in 0..=rounds {
        let mut left = times(matrix, &right, rows);
        if let (Some(before), Effort::Converged) = (&found, effort)
            && converged(before, &left, count)
        {
            break;
        }
        orthonormalise(&mut left);
        let across = times_transposed(matrix, &left);
        let next = decompose(across, &left);
        right = next.right.clone();
        found = Some(next);
        if width == most {
            // The subspace is everything: nothing is left to iterate for.
            break;
        }
    }
    let mut found = found.expect("at least one round was made");
    found.truncate(count);
    found
}

/// The singular values of `left · right`, where `left` is `[rows, rank]` and `right`
/// `[rank, columns]`, exactly and without that matrix.
pub(crate) fn of_product(left: &[f32], right: &[f32], rank: usize) -> Singular {
    let (rows, columns) = (left.len() / rank, right.len() / rank);
    let mut down = Vectors::zeros(rank, rows);
    for (place, value) in left.iter().enumerate() {
        down.values[place % rank * rows + place / rank] = f64::from(*value);
    }
    // left = basis · diag(values) · turnᵀ, so the product is basis · (diag(values) · turnᵀ · right).
    let unit = Vectors::identity(rank);
    let Singular {
        left: turn,
        values,
        right: basis,
    } = decompose(down, &unit);
    let mut core = Vectors::zeros(rank, columns);
    for (k, row) in core.values.chunks_exact_mut(columns).enumerate() {
        for (j, right) in right.chunks_exact(columns).enumerate() {
            let factor = values[k] * turn.vector(k)[j];
            for (sum, value) in row.iter_mut().zip(right) {
                *sum += factor * f64::from(*value);
            }
        }
    }
    decompose(core, &basis)
}

impl Singular {
    pub fn truncate(&mut self, count: usize) {
        self.values.truncate(count);
        self.left.values.truncate(count * self.left.length);
        self.right.values.truncate(count * self.right.length);
    }

    /// The pair `(A [count, columns], B [rows, count])` with `B · A` the sum over `scaling`, the
    /// square root of each value on either side.
    pub fn halves(&self, scaling: f64) -> (Vec<f32>, Vec<f32>) {
        let count = self.values.len();
        let roots: Vec<f64> = self
            .values
            .iter()
            .map(|value| (value / scaling).sqrt())
            .collect();
        let a = (0..count)
            .flat_map(|k| self.right.vector(k).iter().map(move |v| (k, v)))
            .map(|(k, value)| (roots[k] * value) as f32)
            .collect();
        let mut b = vec![0f32; self.left.length * count];
        for k in 0..count {
            for (row, value) in self.left.vector(k).iter().enumerate() {
                b[row * count + k] = (roots[k] * value) as f32;
            }
        }
        (a, b)
    }
}

impl Vectors {
    fn zeros(count: usize, length: usize) -> Vectors {
        Vectors {
            length,
            values: vec![0.0; count * length],
        }
    }

    fn identity(length: usize) -> Vectors {
        let mut unit = Vectors::zeros(length, length);
        for place in 0..length {
            unit.values[place * length + place] = 1.0;
        }
        unit
    }

    fn count(&self) -> usize {
        self.values.len() / self.length
    }

    fn vector(&self, index: usize) -> &[f64] {
        &self.values[index * self.length..(index + 1) * self.length]
    }

    fn pair(&mut self, first: usize, second: usize) -> (&mut [f64], &mut [f64]) {
        let (before, after) = self.values.split_at_mut(second * self.length);
        let start = first * self.length;
        (
            &mut before[start..start + self.length],
            &mut after[..self.length],
        )
    }
}

/// With `across` the columns of a matrix `M` and `basis` orthonormal vectors, the singular value
/// decomposition of `Σ basis[k] · across[k]ᵀ`: rotates pairs of `across` until all are orthogonal
/// (Hestenes 1958), and `basis` along with them.
fn decompose(mut across: Vectors, basis: &Vectors) -> Singular {
    let count = across.count();
    let mut left = basis.clone();
    for _ in 0..MOST_SWEEPS {
        let mut rotated = false;
        for first in 0..count {
            for second in first + 1..count {
                let (a, b) = across.pair(first, second);
                let (aa, bb, ab) = (dot(a, a), dot(b, b), dot(a, b));
                // Below this their product is the rounding of its terms.
                if ab.abs() <= 1e-15 * (aa * bb).sqrt() || ab == 0.0 {
                    continue;
                }
                rotated = true;
                let ratio = (bb - aa) / (2.0 * ab);
                let tangent = ratio.signum() / (ratio.abs() + (1.0 + ratio * ratio).sqrt());
                let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
                let sine = tangent * cosine;
                rotate(a, b, cosine, sine);
                let (a, b) = left.pair(first, second);
                rotate(a, b, cosine, sine);
            }
        }
        if !rotated {
            break;
        }
    }
    let norms: Vec<f64> = (0..count)
        .map(|k| dot(across.vector(k), across.vector(k)).sqrt())
        .collect();
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|a, b| norms[*b].total_cmp(&norms[*a]));
    let mut sorted = Singular {
        left: Vectors::zeros(count, left.length),
        values: order.iter().map(|k| norms[*k]).collect(),
        right: Vectors::zeros(count, across.length),
    };
    for (place, k) in order.into_iter().enumerate() {
        let length = left.length;
        sorted.left.values[place * length..(place + 1) * length].copy_from_slice(left.vector(k));
        let length = across.length;
        let target = &mut sorted.right.values[place * length..(place + 1) * length];
        if norms[k] > 0.0 {
            for (target, value) in target.iter_mut().zip(across.vector(k)) {
                *target = value / norms[k];
            }
        }
    }
    sorted
}

/// Whether `M · right` is `values · left` for the first vectors.
fn converged(found: &Singular, products: &Vectors, count: usize) -> bool {
    let largest = found.values.first().copied().unwrap_or(0.0);
    (0..count).all(|k| {
        let residual: f64 = products
            .vector(k)
            .iter()
            .zip(found.left.vector(k))
            .map(|(product, left)| (product - found.values[k] * left).powi(2))
            .sum();
        residual.sqrt() <= CONVERGED * largest
    })
}

/// Gram and Schmidt, twice, so that what the first pass leaves of earlier vectors goes too.
fn orthonormalise(vectors: &mut Vectors) {
    for k in 0..vectors.count() {
        let scale = dot(vectors.vector(k), vectors.vector(k)).sqrt();
        for _ in 0..2 {
            for earlier in 0..k {
                let (basis, vector) = vectors.pair(earlier, k);
                let share = dot(basis, vector);
                for (value, basis) in vector.iter_mut().zip(basis.iter()) {
                    *value -= share * basis;
                }
            }
        }
        let norm = dot(vectors.vector(k), vectors.vector(k)).sqrt();
        // A vector that the earlier ones span is nothing but rounding: it spans nothing more.
        let factor = if norm > 1e-12 * scale {
            1.0 / norm
        } else {
            0.0
        };
        let length = vectors.length;
        for value in &mut vectors.values[k * length..(k + 1) * length] {
            *value *= factor;
        }
    }
}

/// `matrix · vector` of each vector.
fn times(matrix: &[f32], vectors: &Vectors, rows: usize) -> Vectors {
    let columns = vectors.length;
    let mut products = Vectors::zeros(vectors.count(), rows);
    over_vectors(&mut products, |k, product| {
        let vector = vectors.vector(k);
        for (product, row) in product.iter_mut().zip(matrix.chunks_exact(columns)) {
            *product = dot(row, vector);
        }
    });
    products
}

/// `matrixᵀ · vector` of each vector.
fn times_transposed(matrix: &[f32], vectors: &Vectors) -> Vectors {
    let columns = matrix.len() / vectors.length;
    let mut products = Vectors::zeros(vectors.count(), columns);
    over_vectors(&mut products, |k, product| {
        for (factor, row) in vectors.vector(k).iter().zip(matrix.chunks_exact(columns)) {
            for (sum, value) in product.iter_mut().zip(row) {
                *sum += factor * f64::from(*value);
            }
        }
    });
    products
}

/// Fills each vector, some on each thread; a vector is computed by one thread, in one order.
fn over_vectors(vectors: &mut Vectors, fill: impl Fn(usize, &mut [f64]) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let each = vectors.count().div_ceil(threads).max(1);
    let length = vectors.length;
    std::thread::scope(|scope| {
        for (part, values) in vectors.values.chunks_mut(each * length).enumerate() {
            let fill = &fill;
            scope.spawn(move || {
                for (k, vector) in values.chunks_exact_mut(length).enumerate() {
                    fill(part * each + k, vector);
                }
            });
        }
    });
}

fn rotate(a: &mut [f64], b: &mut [f64], cosine: f64, sine: f64) {
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (cosine * *a - sine * *b, sine * *a + cosine * *b);
    }
}

/// Eight sums side by side, which the compiler makes one instruction of.
fn dot<T: Copy + Into<f64>>(a: &[T], b: &[f64]) -> f64 {
    let mut sums = [0.0f64; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a
        .remainder()
        .iter()
        .zip(b.remainder())
        .map(|(&a, b)| a.into() * b)
        .sum();
    for (a, b) in a.zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane].into() * b[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn drawn(name: &str, count: usize) -> Vec<f32> {
        Stream::new(5, name).normal(count, 1.0)
    }

    fn product(left: &[f32], right: &[f32], rank: usize) -> Vec<f32> {
        let columns = right.len() / rank;
        let mut product = vec![0f64; left.len() / rank * columns];
        for (row, left) in product
            .chunks_exact_mut(columns)
            .zip(left.chunks_exact(rank))
        {
            for (factor, right) in left.iter().zip(right.chunks_exact(columns)) {
                for (sum, value) in row.iter_mut().zip(right) {
                    *sum += f64::from(*factor) * f64::from(*value);
                }
            }
        }
        product.into_iter().map(|value| value as f32).collect()
    }

    fn difference(a: &[f32], b: &[f32]) -> f32 {
        let pairs = a.iter().zip(b);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    fn orthonormal(vectors: &Vectors) {
        for first in 0..vectors.count() {
            for second in 0..vectors.count() {
                let expected = f64::from(u8::from(first == second));
                let found = dot(vectors.vector(first), vectors.vector(second));
                assert!(
                    (found - expected).abs() < 1e-10,
                    "{first} {second}: {found}"
                );
            }
        }
    }

    #[test]
    fn all_values_give_the_matrix_back_and_fewer_the_nearest_of_their_rank() {
        for shape in [[6, 9], [9, 6], [5, 5]] {
            let matrix = drawn("m", shape[0] * shape[1]);
            let count = shape[0].min(shape[1]);
            let all = largest(
                &matrix,
                shape,
                count,
                Effort::Converged,
                Stream::new(1, "s"),
            );
            orthonormal(&all.left);
            orthonormal(&all.right);
            let (a, b) = all.halves(2.0);
            let doubled: Vec<f32> = b.iter().map(|value| 2.0 * value).collect();
            assert!(difference(&product(&doubled, &a, count), &matrix) < 1e-5);

            // Eckart and Young: what is missing has the norm of the values that are.
            let mut some = all.clone();
            some.truncate(3);
            let (a, b) = some.halves(1.0);
            let near = product(&b, &a, 3);
            let missing: f64 = matrix
                .iter()
                .zip(&near)
                .map(|(m, n)| f64::from(m - n).powi(2))
                .sum();
            let expected: f64 = all.values[3..].iter().map(|value| value * value).sum();
            assert!(
                (missing - expected).abs() < 1e-4 * expected,
                "{missing} {expected}"
            );
        }
    }

    #[test]
    fn converged_values_of_a_large_matrix_are_those_of_all_its_vectors() {
        let shape = [120, 90];
        let matrix = drawn("large", 120 * 90);
        let whole = largest(&matrix, shape, 90, Effort::Converged, Stream::new(1, "s"));
        let some = largest(&matrix, shape, 4, Effort::Converged, Stream::new(2, "s"));
        for (some, whole) in some.values.iter().zip(&whole.values) {
            assert!((some / whole - 1.0).abs() < 1e-9, "{some} {whole}");
        }
        let rough = largest(&matrix, shape, 4, Effort::Rounds(1), Stream::new(2, "s"));
        let rougher: f64 = rough.values.iter().sum();
        assert!(rougher < some.values.iter().sum::<f64>());
    }

    #[test]
    fn a_product_without_full_rank_has_zeros_last() {
        let mut left = drawn("l", 7 * 3);
        for row in left.chunks_exact_mut(3) {
            row[2] = row[0];
        }
        let found = of_product(&left, &drawn("r", 3 * 5), 3);
        assert!(found.values[1] > 0.1 && found.values[2] < 1e-6);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_product_of_thin_matrices_is_kept(
            rows in 1usize..20, columns in 1usize..20, rank in 1usize..6, seed in 0u64..1000,
        ) {
            let left = Stream::new(seed, "left").normal(rows * rank, 1.0);
            let right = Stream::new(seed, "right").normal(rank * columns, 1.0);
            let found = of_product(&left, &right, rank);
            let (a, b) = found.halves(1.0);
            let expected = product(&left, &right, rank);
            prop_assert!(difference(&product(&b, &a, rank), &expected) < 1e-4);
        }
    }
}
