//! When requests are due.

use understudy_models::noise;

use super::Mix;

/// A request to be sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrival {
    /// Its place among all of the run, from 0.
    pub number: u64,
    /// When it is due, in seconds from the start of the run.
    pub at: f64,
    /// Which entry of the mix it is for.
    pub entry: usize,
}

/// Uniform in (0, 1): draw number `draw` (below 2⁶³) of the stream `seed`.
pub fn uniform(seed: u64, draw: u64) -> f64 {
    (noise::uniform_u64(seed, draw) as f64 + 0.5) / 2f64.powi(64)
}

/// When the events of a Poisson process come, in seconds from its start: gaps are exponential with mean
/// 1/`rate`. The same arguments give the same times.
pub fn poisson(seed: u64, rate: f64, seconds: f64) -> impl Iterator<Item = f64> {
    let gaps = (0..).map(move |i| -uniform(seed, 2 * i).ln() / rate);
    let times = gaps.scan(0.0, |now, gap| {
        *now += gap;
        Some(*now)
    });
    times.take_while(move |&at| at < seconds)
}

/// A Poisson process of `rate` requests per second for so many seconds, of which each falls on an entry of
/// the mix with the probability of its weight. The same arguments give the same arrivals.
pub fn arrivals(seed: u64, rate: f64, seconds: f64, mix: &Mix) -> impl Iterator<Item = Arrival> {
    (0..).zip(poisson(seed, rate, seconds)).map(move |(number, at)| Arrival {
        number,
        at,
        // Odd draws are nobody's gaps.
        entry: mix.pick(uniform(seed, 2 * number + 1)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64, rate: f64, seconds: f64, mix: &str) -> Vec<Arrival> {
        arrivals(seed, rate, seconds, &mix.parse().unwrap()).collect()
    }

    fn mean_and_variance(values: &[f64]) -> (f64, f64) {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
        (mean, squares / (values.len() - 1) as f64)
    }

    /// Bounds are four standard errors of the statistic.
    #[test]
    fn gaps_are_exponential() {
        let (rate, n) = (40.0, 40_000.0f64);
        let plan = plan(3, rate, n / rate, "a");
        let mut gaps: Vec<f64> = plan.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
        let (mean, variance) = mean_and_variance(&gaps);
        // The mean's standard error is (1/rate)/√n; the variance's √8 (1/rate²)/√n (fourth moment 9/rate⁴).
        assert!((mean * rate - 1.0).abs() < 4.0 / n.sqrt(), "{mean}");
        assert!((variance * rate * rate - 1.0).abs() < 4.0 * (8.0 / n).sqrt(), "{variance}");
        // Kolmogorov and Smirnov's distance; 1.95/√n is exceeded once in a thousand times.
        gaps.sort_by(f64::total_cmp);
        let distance = gaps.iter().enumerate().map(|(i, gap)| {
            let expected = 1.0 - (-rate * gap).exp();
            (expected - (i as f64 + 0.5) / gaps.len() as f64).abs()
        });
        let distance = distance.fold(0.0, f64::max);
        assert!(distance < 1.95 / n.sqrt(), "{distance}");
    }

    #[test]
    fn counts_have_the_variance_of_their_mean_and_do_not_remember() {
        let (rate, windows) = (5.0, 4_000usize);
        let mut counts = vec![0.0; windows];
        for arrival in plan(8, rate, windows as f64, "a") {
            counts[arrival.at as usize] += 1.0;
        }
        let (mean, variance) = mean_and_variance(&counts);
        let n = windows as f64;
        assert!((mean - rate).abs() < 4.0 * (rate / n).sqrt(), "{mean}");
        assert!((variance / mean - 1.0).abs() < 4.0 * (2.0 / n).sqrt(), "{variance} {mean}");
        let products = counts.windows(2).map(|pair| (pair[0] - mean) * (pair[1] - mean));
        let correlation = products.sum::<f64>() / (n - 1.0) / variance;
        assert!(correlation.abs() < 4.0 / n.sqrt(), "{correlation}");
    }

    #[test]
    fn entries_come_by_weight_whatever_came_before() {
        let plan = plan(1, 100.0, 400.0, "a=1,b=4");
        let n = plan.len() as f64;
        let share = plan.iter().filter(|arrival| arrival.entry == 1).count() as f64 / n;
        assert!((share - 0.8).abs() < 4.0 * (0.16 / n).sqrt(), "{share}");
        let pairs = plan.windows(2).filter(|pair| pair[0].entry == 1 && pair[1].entry == 1);
        assert!((pairs.count() as f64 / n - 0.64).abs() < 0.02);
    }

    #[test]
    fn the_seed_decides() {
        assert_eq!(plan(1, 9.0, 10.0, "a,b"), plan(1, 9.0, 10.0, "a,b"));
        assert_ne!(plan(1, 9.0, 10.0, "a,b"), plan(2, 9.0, 10.0, "a,b"));
        assert!(plan(1, 9.0, 10.0, "a").iter().enumerate().all(|(i, a)| a.number == i as u64));
    }
}
