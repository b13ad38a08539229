use crate::SequenceError;

/// First-fit-decreasing bin packing: puts sequences, the longest first, each into the first row
/// with room for it. Returns the rows, each with the positions of its sequences. Uses at most
/// 11/9 of the rows an optimal packing needs, plus 6/9 of one (Dósa 2007).
///
/// Equal lengths keep their order, so the result depends on nothing but the lengths. Takes
/// `O(n log n)`.
///
/// # Errors
/// A sequence that is longer than `capacity`.
pub fn pack(lengths: &[usize], capacity: usize) -> Result<Vec<Vec<usize>>, SequenceError> {
    if let Some(position) = lengths.iter().position(|&length| length > capacity) {
        return Err(SequenceError::DoesNotPack {
            position,
            length: lengths[position],
            capacity,
        });
    }
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&position| std::cmp::Reverse(lengths[position]));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut room = RoomTree::new(lengths.len(), capacity);
    for position in order {
        let row = room.first_with(lengths[position]);
        if row == rows.len() {
            rows.push(Vec::new());
        }
        rows[row].push(position);
        room.take(row, lengths[position]);
    }
    Ok(rows)
}

/// Room left in each row, with the maximum over every subtree, to find the first row with enough
/// of it by walking down from the root.
struct RoomTree {
    leaves: usize,
    room: Vec<usize>,
}

impl RoomTree {
    fn new(rows: usize, capacity: usize) -> Self {
        let leaves = rows.next_power_of_two();
        RoomTree {
            leaves,
            room: vec![capacity; 2 * leaves],
        }
    }

    /// There are as many rows as sequences, and no sequence exceeds a row, so one always exists.
    fn first_with(&self, length: usize) -> usize {
        let mut node = 1;
        while node < self.leaves {
            node *= 2;
            if self.room[node] < length {
                node += 1;
            }
        }
        node - self.leaves
    }

    fn take(&mut self, row: usize, length: usize) {
        let mut node = row + self.leaves;
        self.room[node] -= length;
        while node > 1 {
            node /= 2;
            self.room[node] = self.room[2 * node].max(self.room[2 * node + 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, word for word.
    fn plain_first_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&position| std::cmp::Reverse(lengths[position]));
        let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
        for position in order {
            match rows
                .iter_mut()
                .find(|(used, _)| used + lengths[position] <= capacity)
            {
                Some((used, row)) => {
                    *used += lengths[position];
                    row.push(position);
                }
                None => rows.push((lengths[position], vec![position])),
            }
        }
        rows.into_iter().map(|(_, row)| row).collect()
    }

    #[test]
    fn packs_the_longest_first() {
        let rows = pack(&[3, 7, 5, 2, 3], 10).unwrap();
        assert_eq!(rows, [vec![1, 0], vec![2, 4, 3]]);
        assert!(pack(&[], 10).unwrap().is_empty());
        let error = pack(&[4, 11], 10).unwrap_err().to_string();
        assert!(error.contains("11 tokens (position 1)"), "{error}");
    }

    proptest! {
        #[test]
        fn is_first_fit_decreasing_and_loses_nothing(
            lengths in prop::collection::vec(0usize..=64, 0..200),
            capacity in 64usize..200,
        ) {
            let rows = pack(&lengths, capacity).unwrap();
            prop_assert_eq!(&rows, &plain_first_fit_decreasing(&lengths, capacity));
            let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for row in &rows {
                let used: usize = row.iter().map(|&position| lengths[position]).sum();
                prop_assert!(used <= capacity);
                prop_assert!(!row.is_empty());
            }
        }
    }
}
