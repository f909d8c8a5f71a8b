//! Threads that walk through a list of phases together.
//!
//! Each phase is a number of items that may run in any order on any thread; the next phase begins
//! when all of them are done. Starting a rayon region per phase costs microseconds, as much as the
//! smaller phases themselves, so one scope spans the whole list: the caller leads, helpers join if
//! and when the pool has threads to spare, and nobody waits for a helper that has not come. So it
//! cannot deadlock, however busy the pool is.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Runs `work(phase, item, worker)` for every item of every phase, `phases[i]` being the number of
/// items of phase `i`. `worker` is below `threads` and distinct among those running at one time.
pub(super) fn run(threads: usize, phases: &[usize], work: &(dyn Fn(usize, usize, usize) + Sync)) {
    if threads <= 1 {
        for (phase, &items) in phases.iter().enumerate() {
            for item in 0..items {
                work(phase, item, 0);
            }
        }
        return;
    }
    let team = Team::new(phases, work);
    rayon::scope(|scope| {
        for worker in 1..threads {
            let team = &team;
            scope.spawn(move |_| team.help(worker));
        }
        team.lead();
    });
}

struct Team<'a> {
    phases: &'a [usize],
    work: &'a (dyn Fn(usize, usize, usize) + Sync),
    /// The number of the phase, from 1 on, in the upper half, the next unclaimed item of it in the lower.
    claim: AtomicU64,
    /// Finished items of the current phase.
    done: AtomicUsize,
}

/// No phase has begun. A helper may come before the leader: it must find nothing to claim, or the
/// leader would count its item in a phase that it does not belong to.
const START: u64 = 0;
/// No phase has this number: everything is done.
const END: u64 = u32::MAX as u64;

impl<'a> Team<'a> {
    fn new(phases: &'a [usize], work: &'a (dyn Fn(usize, usize, usize) + Sync)) -> Self {
        Self { phases, work, claim: AtomicU64::new(START << 32), done: AtomicUsize::new(0) }
    }

    fn lead(&self) {
        // Whatever happens here, helpers must learn that it is over.
        let _end = OnDrop(|| self.claim.store(END << 32, Ordering::Release));
        for (number, &items) in (1u64..).zip(self.phases) {
            self.done.store(0, Ordering::Relaxed);
            self.claim.store(number << 32, Ordering::Release);
            while self.one(0) == Claimed::Yes {}
            let mut patience = Patience::default();
            while self.done.load(Ordering::Acquire) < items {
                patience.wait();
            }
        }
    }

    fn help(&self, worker: usize) {
        let mut patience = Patience::default();
        loop {
            match self.one(worker) {
                Claimed::Yes => patience = Patience::default(),
                Claimed::None => patience.wait(),
                Claimed::End => return,
            }
        }
    }

    /// Claims one item and runs it. A phase cannot change under a claimed item, since the leader
    /// waits for all items that were claimed, and numbers only grow, so an old claim cannot pass.
    fn one(&self, worker: usize) -> Claimed {
        let mut seen = self.claim.load(Ordering::Acquire);
        loop {
            let (number, item) = (seen >> 32, (seen & END) as usize);
            let phase = match number {
                START => return Claimed::None,
                END => return Claimed::End,
                number => number as usize - 1,
            };
            if item >= self.phases[phase] {
                return Claimed::None;
            }
            let order = (Ordering::AcqRel, Ordering::Acquire);
            match self.claim.compare_exchange_weak(seen, seen + 1, order.0, order.1) {
                Err(now) => seen = now,
                Ok(_) => {
                    // Counted even if it panics: the leader must not wait for ever.
                    let _done = OnDrop(|| {
                        self.done.fetch_add(1, Ordering::Release);
                    });
                    (self.work)(phase, item, worker);
                    return Claimed::Yes;
                }
            }
        }
    }
}

#[derive(PartialEq)]
enum Claimed {
    Yes,
    None,
    End,
}

/// Spins at first, then lets others have the core.
#[derive(Default)]
struct Patience(u32);

impl Patience {
    fn wait(&mut self) {
        self.0 = self.0.saturating_add(1);
        if self.0 < 2000 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::{Claimed, Team};

    #[test]
    fn a_helper_that_comes_before_the_leader_finds_nothing() {
        let ran = AtomicUsize::new(0);
        let phases = [2, 3];
        let work = |_, _, _| {
            ran.fetch_add(1, Ordering::SeqCst);
        };
        let team = Team::new(&phases, &work);
        assert!(team.one(1) == Claimed::None);
        assert_eq!(ran.load(Ordering::SeqCst), 0);
        team.lead();
        assert_eq!(ran.load(Ordering::SeqCst), 5);
        assert!(team.one(1) == Claimed::End);
    }

    #[test]
    fn phases_follow_each_other_and_every_item_runs_once() {
        let phases = [3, 0, 100, 1, 17];
        // Often: a helper comes before the leader only now and then.
        for threads in (0..2000).flat_map(|_| [1, 2, 5]) {
            let counts: Vec<AtomicUsize> = phases.iter().map(|_| AtomicUsize::new(0)).collect();
            super::run(threads, &phases, &|phase, _, worker| {
                assert!(worker < threads);
                for before in 0..phase {
                    assert_eq!(counts[before].load(Ordering::SeqCst), phases[before]);
                }
                counts[phase].fetch_add(1, Ordering::SeqCst);
            });
            for (count, items) in counts.iter().zip(phases) {
                assert_eq!(count.load(Ordering::SeqCst), items);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        for bad in [0, 63] {
            let outcome = std::panic::catch_unwind(|| {
                super::run(3, &[64, 64], &|phase, item, _| {
                    assert!(phase != 1 || item != bad, "as planned");
                });
            });
            assert!(outcome.is_err());
        }
    }
}
