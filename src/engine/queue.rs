//! Places in the queue, one per image, and whose they are.
//!
//! Who finds no room is told when to come back, and waits from then on. While somebody waits, nobody else may hold more
//! than an equal share of the places; otherwise whoever is quickest to ask again takes every place that gets free.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::Rejected;

/// Whose request it is: two requests of one client have equal names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Client(Arc<str>);

impl From<String> for Client {
    fn from(name: String) -> Self {
        Self(name.into())
    }
}

/// All places.
#[derive(Debug)]
pub(super) struct Queue {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    taken: usize,
    /// Places by who holds them; nobody who holds none.
    held: HashMap<Client, usize>,
    /// Who was refused for want of room, and until when they are expected back.
    waiting: HashMap<Client, Instant>,
}

/// A place; it is free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    queue: Arc<Queue>,
    client: Client,
}

impl Queue {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// So many places for a client, all or none, without waiting. `drain` is when there will be room again.
    ///
    /// # Errors
    /// [`Rejected::QueueFull`] and [`Rejected::QueueShare`].
    pub(super) fn enter(
        self: &Arc<Self>,
        client: &Client,
        asked: usize,
        now: Instant,
        drain: impl FnOnce() -> Duration,
    ) -> Result<Vec<Place>, Rejected> {
        let mut state = self.lock();
        if let Some(full) = state.full(client, self.limit, asked, now) {
            drop(state);
            return Err(self.refuse(full, client, now, drain));
        }
        state.waiting.remove(client);
        state.taken += asked;
        if asked > 0 {
            *state.held.entry(client.clone()).or_default() += asked;
        }
        let place = || Place { queue: Arc::clone(self), client: client.clone() };
        Ok((0..asked).map(|_| place()).collect())
    }

    /// Whether [`Queue::enter`] would give so many places now. Nothing is taken, and who waits goes on waiting.
    ///
    /// # Errors
    /// As [`Queue::enter`].
    pub(super) fn check(
        &self,
        client: &Client,
        asked: usize,
        now: Instant,
        drain: impl FnOnce() -> Duration,
    ) -> Result<(), Rejected> {
        let full = self.lock().full(client, self.limit, asked, now);
        full.map_or(Ok(()), |full| Err(self.refuse(full, client, now, drain)))
    }

    /// What a client is told, who waits from now on if there is no room at all. The state is not locked while `drain` looks
    /// at devices, whose samples give places back.
    fn refuse(
        &self,
        full: Full,
        client: &Client,
        now: Instant,
        drain: impl FnOnce() -> Duration,
    ) -> Rejected {
        let retry_after = drain();
        match full {
            Full::Share { asked, held, share } => {
                Rejected::QueueShare { asked, held, share, retry_after }
            }
            Full::All { asked, free } => {
                // Who is a little late is waited for, who does not come back is not.
                let patience = retry_after.saturating_mul(2).saturating_add(Duration::from_secs(2));
                let until = now.checked_add(patience).unwrap_or(now);
                self.lock().waiting.insert(client.clone(), until);
                Rejected::QueueFull { asked, free, limit: self.limit, retry_after }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there is no room.
enum Full {
    /// So many places are free.
    All { asked: usize, free: usize },
    /// The client holds so many, and its share is so large.
    Share { asked: usize, held: usize, share: usize },
}

impl State {
    /// Why a client cannot have so many places, unless it can.
    fn full(&mut self, client: &Client, limit: usize, asked: usize, now: Instant) -> Option<Full> {
        let free = limit - self.taken;
        if asked > free {
            return Some(Full::All { asked, free });
        }
        let held = self.held.get(client).copied().unwrap_or(0);
        let share = self.share(client, limit, now)?;
        (held > 0 && held + asked > share).then_some(Full::Share { asked, held, share })
    }

    /// What a client may hold while others wait; `None` while none do.
    fn share(&mut self, client: &Client, limit: usize, now: Instant) -> Option<usize> {
        self.waiting.retain(|_, until| *until > now);
        if !self.waiting.keys().any(|waiting| waiting != client) {
            return None;
        }
        let mut clients = self.held.len();
        clients += self.waiting.keys().filter(|waiting| !self.held.contains_key(waiting)).count();
        let counted = self.held.contains_key(client) || self.waiting.contains_key(client);
        Some((limit / (clients + usize::from(!counted))).max(1))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.taken -= 1;
        if let Some(held) = state.held.get_mut(&self.client) {
            *held -= 1;
            if *held == 0 {
                state.held.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn client(name: &str) -> Client {
        Client::from(name.to_owned())
    }

    /// A queue of eight places, asked at seconds of its own clock; it is told to come back after three.
    struct Asked {
        queue: Arc<Queue>,
        zero: Instant,
    }

    impl Asked {
        fn new() -> Self {
            Self { queue: Queue::new(8), zero: Instant::now() }
        }

        fn at(&self, second: u64, name: &str, asked: usize) -> Result<Vec<Place>, Rejected> {
            let now = self.zero + Duration::from_secs(second);
            self.queue.enter(&client(name), asked, now, || Duration::from_secs(3))
        }
    }

    #[test]
    fn one_client_has_the_whole_queue_while_nobody_waits() {
        let asked = Asked::new();
        let all: Vec<_> = (0..8).map(|_| asked.at(0, "a", 1).unwrap()).collect();
        let full = asked.at(0, "a", 1).unwrap_err();
        assert!(
            matches!(full, Rejected::QueueFull { asked: 1, free: 0, limit: 8, .. }),
            "{full:?}"
        );
        drop(all);
        // Having been refused, it competes with nobody.
        assert_eq!(asked.at(0, "a", 8).unwrap().len(), 8);
        // Others are there, but none of them waits.
        let _some = asked.at(0, "b", 1).unwrap();
        assert_eq!(asked.at(0, "a", 7).unwrap().len(), 7);
    }

    #[test]
    fn who_waits_gets_in_before_who_has_its_share() {
        let asked = Asked::new();
        let mut places: Vec<_> = (0..8).flat_map(|_| asked.at(0, "a", 1).unwrap()).collect();
        assert!(matches!(asked.at(0, "b", 2), Err(Rejected::QueueFull { .. })));
        // Places get free one by one, and "a" is always quicker.
        for freed in 1..=4 {
            drop(places.pop());
            let refused = asked.at(1, "a", 1).unwrap_err();
            let Rejected::QueueShare { asked: 1, held, share: 4, .. } = refused else {
                panic!("{refused:?}")
            };
            assert_eq!(held, 8 - freed);
        }
        let others = asked.at(2, "b", 2).unwrap();
        // Nobody waits any more.
        places.extend(asked.at(2, "a", 2).unwrap());
        assert_eq!(places.len() + others.len(), 8);
    }

    #[test]
    fn asking_whether_there_is_room_takes_none_and_gives_up_no_turn() {
        let asked = Asked::new();
        let mut places: Vec<_> = (0..8).flat_map(|_| asked.at(0, "a", 1).unwrap()).collect();
        let check =
            |name: &str| asked.queue.check(&client(name), 1, asked.zero, || Duration::from_secs(3));
        assert!(matches!(check("b"), Err(Rejected::QueueFull { .. })));
        drop(places.pop());
        assert!(check("b").is_ok() && check("b").is_ok());
        // "b" has only asked.
        assert!(matches!(asked.at(1, "a", 1), Err(Rejected::QueueShare { .. })));
        assert!(asked.at(1, "b", 1).is_ok());
    }

    #[test]
    fn who_does_not_come_back_holds_nobody_up() {
        let asked = Asked::new();
        let mut places = asked.at(0, "a", 8).unwrap();
        assert!(asked.at(0, "b", 1).is_err());
        places.truncate(6);
        assert!(matches!(asked.at(7, "a", 1), Err(Rejected::QueueShare { .. })));
        assert!(asked.at(8, "a", 1).is_ok(), "twice the three seconds, and two more, are over");
    }

    #[test]
    fn who_holds_nothing_may_ask_for_more_than_a_share() {
        let asked = Asked::new();
        let places = asked.at(0, "a", 8).unwrap();
        for waiting in ["b", "c", "d"] {
            assert!(asked.at(0, waiting, 4).is_err());
        }
        drop(places);
        let _four = asked.at(1, "b", 4).unwrap();
        assert!(matches!(asked.at(1, "b", 1), Err(Rejected::QueueShare { share: 2, .. })));
        assert!(asked.at(1, "c", 4).is_ok());
    }

    #[test]
    fn shares_of_more_clients_than_places_are_one_place() {
        let asked = Asked::new();
        let places = asked.at(0, "a", 8).unwrap();
        for waiting in 0..20 {
            assert!(asked.at(0, &waiting.to_string(), 1).is_err());
        }
        drop(places);
        let _one = asked.at(1, "0", 1).unwrap();
        assert!(matches!(asked.at(1, "0", 1), Err(Rejected::QueueShare { share: 1, .. })));
        assert!(asked.at(1, "a", 1).is_ok());
    }
}
