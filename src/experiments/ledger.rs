//! Counts that this server adds to, and others may, where a database adds them up.

/// What can be added up.
pub(super) trait Sum: Default + Clone + PartialEq {
    /// Adds what was counted after it.
    fn add(&mut self, more: &Self);
}

/// What the database has, what is on its way there, and what was counted since. Their sum never falls: it is added up in
/// the order in which the database does.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger<T> {
    kept: T,
    sent: Option<T>,
    since: T,
}

impl<T: Sum> Ledger<T> {
    /// What the database has.
    pub(super) fn of(kept: T) -> Self {
        Self { kept, sent: None, since: T::default() }
    }

    /// Where to count.
    pub(super) fn open(&mut self) -> &mut T {
        &mut self.since
    }

    pub(super) fn total(&self) -> T {
        let mut total = self.kept.clone();
        self.sent.iter().for_each(|sent| total.add(sent));
        total.add(&self.since);
        total
    }

    /// What the database is to add; the same again, until it is known whether it did.
    pub(super) fn send(&mut self) -> T {
        self.sent.get_or_insert_with(|| std::mem::take(&mut self.since)).clone()
    }

    /// Whether something was counted that has not been sent.
    pub(super) fn has_more(&self) -> bool {
        self.since != T::default()
    }

    /// What the database has by now, and whether what was sent is in it.
    pub(super) fn settle(&mut self, kept: T, arrived: bool) {
        self.kept = kept;
        if arrived {
            self.sent = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::experiments::traffic::Traffic;

    fn counted(times: &[f64]) -> Traffic {
        let mut traffic = Traffic::default();
        times.iter().for_each(|seconds| traffic.count(1, *seconds));
        traffic
    }

    proptest! {
        /// What a counter shows never falls, whatever others add and however often sending fails.
        #[test]
        fn the_total_never_falls(
            steps in prop::collection::vec((0..4u8, prop::collection::vec(0.0..400.0f64, 0..3)), 0..40)
        ) {
            let (mut ledger, mut database) = (Ledger::of(Traffic::default()), Traffic::default());
            let (mut before, mut counts) = (Traffic::default(), 0);
            for (step, times) in steps {
                match step {
                    0 => times.iter().for_each(|seconds| ledger.open().count(1, *seconds)),
                    // Another server's.
                    1 => database.add(&counted(&times)),
                    // Sent, and lost on its way.
                    2 => drop(ledger.send()),
                    _ => {
                        database.add(&ledger.send());
                        ledger.settle(database.clone(), true);
                    }
                }
                if step < 2 {
                    counts += times.len() as u64;
                }
                let total = ledger.total();
                prop_assert!(total.seconds >= before.seconds && total.images >= before.images);
                before = total;
            }
            database.add(&ledger.send());
            ledger.settle(database.clone(), true);
            database.add(&ledger.send());
            prop_assert_eq!(database.images, counts, "every count arrives once");
        }
    }
}
